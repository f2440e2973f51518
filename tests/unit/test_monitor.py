"""Metrics go to three places, and TensorBoard's own reader reads them back. A resumed run leaves no duplicate steps."""

import json
import math
import resource
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kfood_dist.data.batch.collate import Batch
from kfood_dist.system.console import LineFile
from kfood_dist.system.world import World
from kfood_dist.train.run.facts import machine_facts
from kfood_dist.train.run.monitor import RunLog, StepMeter, clock, read_metrics


def row(step: int, loss: float) -> dict[str, float]:
    return {
        "step": step,
        "loss": loss,
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "samples": 4 * step,
        "samples_per_second": 10.0,
        "label_tokens_per_second": 50.0,
        "data_wait_share": 0.1,
        "mfu": 0.412,
        "padding_share": 0.2,
        "peak_memory_gib": 1.5,
        "refused": 0.0,
        "replaced": 0.0,
        "skipped": 0.0,
        "step_seconds": 0.4,
    }


def write(folder: Path, start: int, losses: list[float]) -> None:
    log = RunLog(folder, World(), start, max_steps=10, every=2)
    for i, loss in enumerate(losses):
        log.step(row(start + i + 1, loss))
    log.evaluation(start + len(losses), "val", {"accuracy": 0.75})
    log.close()


def test_one_dict_reaches_file_console_and_tensorboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 0, [3.0, 2.0, 1.0])
    assert [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [3.0, 2.0, 1.0]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if "loss" in line] == ["2/10"]
    assert "lr 1.00e-03" in lines[0] and "mfu 41.2%  wait 10%" in lines[0] and "pad 20%" in lines[0]
    assert lines[-1] == "step 3  val  accuracy 0.75"
    assert "loss 2.0000" in (tmp_path / "log.txt").read_text()
    assert "step 3  val  accuracy 0.75" in (tmp_path / "log.txt").read_text()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "train/padding_share"} <= set(
        events.Tags()["scalars"]
    )
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert events.Scalars("eval/accuracy")[0].value == 0.75


def test_a_resumed_run_removes_the_metrics_of_the_steps_it_repeats(tmp_path: Path) -> None:
    write(tmp_path, 0, [3.0, 2.0, 1.0])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('garbage\n{"step": 4, "lo')  # a line that a kill cut short
    write(tmp_path, 2, [0.5, 0.25])
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 3.0),
        (2, 2.0),
        (3, 0.5),
        (4, 0.25),
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 3.0), (2, 2.0), (3, 0.5), (4, 0.25)]


def test_a_skipped_step_is_counted_and_the_file_stays_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, World(), 0, max_steps=10, every=1)
    log.step({**row(1, 3.0), "loss_scale": 65536.0})
    log.step({**row(2, math.nan), "grad_norm": math.inf, "skipped": 1.0, "loss_scale": 32768.0})
    log.close()
    log = RunLog(tmp_path, World(), 2, max_steps=10, every=1)  # a resumed run continues the count
    log.step({**row(3, math.nan), "skipped": 1.0})
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON")) for line in lines]
    assert [(r["loss"], r["grad_norm"], r["skipped_in_all"]) for r in rows] == [
        (3.0, 0.5, 0),
        (None, None, 1),
        (None, 0.5, 2),
    ]
    message = capsys.readouterr().out.splitlines()
    assert "skipped" not in message[0] and "scale 65536" in message[0]
    assert message[1].endswith("skipped so far 1") and message[2].endswith("skipped so far 2")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/skipped_in_all")] == [(1, 0.0), (2, 1.0), (3, 2.0)]
    assert [e.value for e in events.Scalars("train/loss")] == [3.0]


@pytest.mark.parametrize("start", [0, 500])
def test_the_time_left_follows_the_median_step_without_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], start: int
) -> None:
    """The first step waits for the loader and the kernels, and single steps wait for the disk.

    A resumed run starts the estimate again.
    """
    log = RunLog(tmp_path, World(), start, max_steps=start + 1000, every=1)
    for i, seconds in enumerate([60.0, 2.0, 2.5, 40.0, 2.0]):
        log.step(row(start + i + 1, 1.0) | {"step_seconds": seconds})
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert "left" not in lines[0]
    message = [line.split("left ")[1] for line in lines[1:]]
    assert message == ["33:16", "37:23", "41:30", "37:19"]  # 998 × 2, 997 × 2.25, 996 × 2.5, 995 × 2.25 s


def test_the_time_left_follows_a_lasting_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, World(), 0, max_steps=1000, every=400)
    for i in range(400):
        log.step(row(i + 1, 1.0) | {"step_seconds": 1.0 if i < 340 else 6.0})
    log.close()
    assert capsys.readouterr().out.splitlines()[-1].endswith("left 1:00:00")


@pytest.mark.parametrize(("seconds", "message"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (360061, "100:01:01")])
def test_a_duration_is_shown_as_a_clock(seconds: float, message: str) -> None:
    assert clock(seconds) == message


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path, World(rank=1, size=2), 0, 10, 1)
    log.say("hello")
    log.step(row(1, 1.0))
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_the_meter_divides_by_the_weight_and_counts_padding() -> None:
    batch = Batch(
        input_ids=torch.zeros(2, 5, dtype=torch.long),
        attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]),
        is_image=torch.zeros(2, 5, dtype=torch.long),
        labels=torch.tensor([[-100, -100, 5, 6, 7], [-100, 8, -100, -100, -100]]),
        pixels=torch.zeros(0, 588, dtype=torch.uint8),
        facts={},
        shapes={},
        predicting=torch.tensor([1, 2, 3, 5]),
        targets=torch.tensor([5, 6, 7, 8]),
        target_rows=torch.tensor([0, 0, 0, 1]),
        ids=(3, 4),
        refused=("train-00000009",),
        replaced=("train-00000003", "train-00000004"),
    )
    totals = StepMeter(batches=[batch], flops=600).reduce(World(), torch.tensor(8.0), weight=4)
    assert totals["loss"] == 2.0
    assert totals["padding_share"] == pytest.approx(0.3)
    assert (totals["refused"], totals["replaced"]) == (1, 2)
    assert totals["flops_per_second"] == pytest.approx(600 / totals["step_seconds"])
    assert totals["samples_per_second"] == pytest.approx(totals["label_tokens_per_second"] / 2)
    json.dumps(totals)


def test_lines_that_a_full_disk_refuses_are_written_once_there_is_room(tmp_path: Path) -> None:
    """A limit on the file size makes the kernel refuse a write halfway through a line, as a full disk does."""
    file = LineFile(tmp_path / "log.txt")
    lines = [f"line {i} with some words\n" for i in range(100)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        for line in lines[:70]:
            file.write(line)
        assert (tmp_path / "log.txt").stat().st_size == 1000
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    for line in lines[70:]:
        file.write(line)
    file.close()
    assert (tmp_path / "log.txt").read_text() == "".join(lines)


def test_machine_facts_do_not_need_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine_facts()["git_commit"] is None
