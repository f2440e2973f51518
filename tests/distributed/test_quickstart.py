"""The quickstart as a newcomer runs it: killed in the middle, started again, run to its end and evaluated."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from running import ROOT, environment, metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kfood_dist.evaluate.report import load_report

TIMEOUT_S = 1500


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the files that git tracks, except tests/ and .ci/, to a new folder with a link to this checkout's .venv."""
    folder = tmp_path_factory.mktemp("checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if not name.startswith(("tests/", ".ci/")) and (ROOT / name).exists():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder


def start(checkout: Path, log: Path) -> "subprocess.Popen[bytes]":
    with log.open("wb") as file:
        return subprocess.Popen(
            ["bash", "launch/quickstart.sh"],
            cwd=checkout,
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@pytest.fixture(scope="module")
def finished(checkout: Path) -> tuple[Path, str]:
    """Return the run's folder and the output of the second start."""
    run, log = checkout / "runs" / "quickstart", checkout / "log.txt"
    first = start(checkout, log)
    deadline = time.monotonic() + TIMEOUT_S
    while first.poll() is None and time.monotonic() < deadline:
        if list(run.glob("checkpoints/step-*/COMPLETE")):
            break
        time.sleep(0.2)
    assert first.poll() is None, log.read_text()
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert start(checkout, log).wait(timeout=TIMEOUT_S) == 0, log.read_text()
    return run, log.read_text()


@pytest.mark.timeout(2 * TIMEOUT_S)
def test_the_tuned_model_names_the_dishes_and_the_base_does_not(finished: tuple[Path, str]) -> None:
    run, output = finished
    comparison = json.loads((run / "comparison.json").read_text())
    assert comparison["test_images"] >= 100
    assert comparison["base_accuracy"] <= 0.10
    assert comparison["tuned_accuracy"] >= 0.85
    predictions = [json.loads(line) for line in (run / "tuned" / "predictions.jsonl").read_text().splitlines()]
    assert len({p["key"] for p in predictions}) == len(predictions) == comparison["test_images"]
    assert comparison["tuned_accuracy"] == sum(p["correct"] for p in predictions) / len(predictions)
    assert load_report(run / "tuned").accuracy == comparison["tuned_accuracy"]
    assert "TensorBoard: .venv/bin/tensorboard --logdir runs/quickstart/tensorboard" in output


def test_a_killed_quickstart_resumes_and_reuses_its_finished_parts(finished: tuple[Path, str]) -> None:
    run, resumed = finished
    assert "resumed after step" in resumed
    assert "reused data/practice" in resumed
    assert "reused   " in resumed and "shards/practice" in resumed
    assert "reused runs/quickstart/base" in resumed
    steps = [row["step"] for row in metrics(run)]
    assert steps == list(range(1, len(steps) + 1))


def test_the_quickstart_trains_in_4_bit_with_deepspeed(finished: tuple[Path, str]) -> None:
    facts = json.loads((finished[0] / "run.json").read_text())
    assert (facts["world_size"], facts["distributed_type"], facts["zero_stage"]) in [
        (2, "DEEPSPEED", 2),
        (1, "DEEPSPEED", 2),
    ]
    assert facts["gradient_accumulation_steps"] >= 8
    assert facts["linear_layers"]["language_model"].keys() == {"Linear4bit"}
    assert facts["optimizer"].endswith("AdamW8bit") and facts["optimizer_state_dtypes"] == ["uint8"]


def test_tensorboard_has_the_curves_the_accuracy_and_a_picture_panel(finished: tuple[Path, str]) -> None:
    events = EventAccumulator(str(finished[0] / "tensorboard"), size_guidance={"images": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    names = "loss learning_rate grad_norm samples_per_second label_tokens_per_second data_wait_share padding_share"
    names += " flops_per_second mfu peak_memory_gib"
    assert {f"train/{name}" for name in names.split()} <= set(tags["scalars"])
    assert "eval/accuracy" in tags["scalars"]
    (accuracy,) = events.Scalars("test/accuracy")
    published = json.loads((finished[0] / "run.json").read_text())["published"]
    comparison = json.loads((finished[0] / "comparison.json").read_text())
    assert accuracy.value == pytest.approx(comparison["tuned_accuracy"])
    assert accuracy.step == published["step"]
    assert "test/predictions" in tags["images"]
    caption = events.Tensors("test/predictions/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "expected" in caption and "predicted" in caption
