"""What cannot be saved now is saved later: a place that cannot be written to costs no step of training."""

import time
from pathlib import Path

from running import adapter_bytes, metrics, start, write_recipe
from whole import WHOLE_STEPS, Whole


def test_training_goes_on_and_saves_when_it_can_again(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, whole: Whole
) -> None:
    (tmp_path / "hindered").mkdir()
    section = {"max_steps": WHOLE_STEPS, "save_every_steps": 3}
    hindered = write_recipe(tmp_path / "hindered" / "recipe.yaml", tiny_model, tiny_shards, train=section)
    run = tmp_path / "hindered" / "run"
    (run / "run.json").mkdir(parents=True)  # nor can this be written
    process = start(hindered, 2)
    deadline = time.monotonic() + 240
    while not ((run / "metrics.jsonl").is_file() and metrics(run)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.002)
    (run / "checkpoints").write_text("in the way, as a folder that may not be written to is\n")
    while "tries again after step 4" not in (run / "log.txt").read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    log = (run / "log.txt").read_text()
    assert "step 3: checkpoint " in log and "could not be written (rank 0: " in log
    while "tried again in 1 s" not in (run / "log.txt").read_text():  # to the end, where it insists
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    (run / "checkpoints").unlink()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "tried again in 1 s" in output and "Traceback" not in output
    assert f"step {WHOLE_STEPS}: checkpoint written" in output
    assert f"step 1: {run / 'run.json'} cannot be written (Is a directory)" in output
    assert [row["loss"] for row in metrics(run)] == [row["loss"] for row in metrics(whole(2, 2))]
    assert adapter_bytes(run) == adapter_bytes(whole(2, 2))
