"""A checkpoint that cannot be written now is written later. A folder that is not writable costs no training step."""

from pathlib import Path

from running import adapter_bytes, metrics, num_steps, training, wait_until, write_recipe
from whole import WHOLE_STEPS, Whole


def test_training_continues_and_saves_when_the_folder_is_writable_again(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, whole: Whole
) -> None:
    (tmp_path / "hindered").mkdir()
    section = {"max_steps": WHOLE_STEPS, "save_every_steps": 3}
    hindered = write_recipe(tmp_path / "hindered" / "recipe.yaml", tiny_model, tiny_shards, train=section)
    run = tmp_path / "hindered" / "run"
    (run / "run.json").mkdir(parents=True)  # run.json cannot be written either
    with training(hindered, 2) as ranks:
        wait_until(ranks, lambda: num_steps(run) >= 1)
        (run / "checkpoints").write_text("in the way, as a folder that may not be written to is\n")
        wait_until(ranks, lambda: "tries again after step 4" in (run / "log.txt").read_text())
        log = (run / "log.txt").read_text()
        assert "step 3: checkpoint " in log and "could not be written (rank 0: " in log
        # After the last step the run retries until it succeeds.
        wait_until(ranks, lambda: "trying again in 1 s" in (run / "log.txt").read_text())
        (run / "checkpoints").unlink()
        ended = ranks.wait(240)
    assert ended.status == 0, ended.output
    assert "trying again in 1 s" in ended.output and "Traceback" not in ended.output
    assert f"step {WHOLE_STEPS}: checkpoint written" in ended.output
    assert f"step 1: {run / 'run.json'} cannot be written (Is a directory)" in ended.output
    assert [row["loss"] for row in metrics(run)] == [row["loss"] for row in metrics(whole(2, 2))]
    assert adapter_bytes(run) == adapter_bytes(whole(2, 2))
