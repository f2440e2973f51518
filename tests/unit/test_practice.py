"""The practice set has AI-Hub's layout, real sizes and formats and no picture twice. Its model is of the real class."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from running import environment

from kfood_dist.cli import main
from kfood_dist.practice.pictures import DISHES, render

EXIF_ORIENTATION = 0x0112


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def rendered() -> dict[tuple[str, int], tuple[str, bytes]]:
    return {(dish.name, number): render(0, dish, number) for dish in DISHES for number in range(8)}


def test_the_dishes_are_real_ones() -> None:
    table = (Path(__file__).resolve().parents[2] / "shards" / "kfood150.tsv").read_text(encoding="utf-8")
    rows = [line.split("\t") for line in table.splitlines()[1:]]
    known = {(int(row[0]), row[1], row[2]) for row in rows}
    assert len(known) == 150
    assert len(DISHES) == 10
    assert {(dish.id, dish.category, dish.name) for dish in DISHES} <= known


def test_sizes_and_formats_are_like_the_real_ones(rendered) -> None:
    suffixes, widths, turned = set(), [], 0
    for name, data in rendered.values():
        suffixes.add(name[name.rindex(".") :])
        with Image.open(io.BytesIO(data)) as image:
            widths.append(image.width)
            turned += image.getexif().get(EXIF_ORIENTATION, 1) != 1
    assert suffixes == {".jpg", ".JPG", ".jpeg", ".png"}
    assert min(widths) >= 225 and max(widths) <= 1600  # the stored width of a rotated picture is its visible height
    assert np.median(widths) > 400
    assert 0 < turned < len(rendered) / 4


def test_each_picture_depends_only_on_seed_dish_and_number() -> None:
    dish = DISHES[3]
    assert render(0, dish, 5) == render(0, dish, 5)
    assert len({render(0, dish, 5)[1], render(1, dish, 5)[1], render(0, dish, 6)[1], render(0, DISHES[4], 5)[1]}) == 4


def test_no_picture_is_a_copy_of_another(rendered) -> None:
    """As 16 × 16 thumbnails, two pictures differ by over 8 of 255 on average, and a re-encoded copy by under 3."""

    def thumbnail(data: bytes, quality: int | None = None) -> np.ndarray:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        if quality:
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality)
            image = Image.open(buffer)
        return np.asarray(image.resize((16, 16), Image.Resampling.BOX), dtype=np.float32).ravel()

    thumbnails = np.stack([thumbnail(data) for _, data in rendered.values()])
    distances = np.abs(thumbnails[:, None] - thumbnails[None]).mean(-1)
    np.fill_diagonal(distances, 255)
    assert distances.min() > 8
    first = next(iter(rendered.values()))[1]
    assert np.abs(thumbnail(first) - thumbnail(first, quality=60)).mean() < 3


def test_mini_writes_the_layout_and_is_reused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "practice"
    words = ["mini", str(folder), "--per-class", "2"]
    assert main(words) == 0
    pictures = sorted(p.relative_to(folder / "images") for p in (folder / "images").rglob("Img_*"))
    assert len(pictures) == 2 * len(DISHES)
    for path in pictures:
        category, again, dish, name = path.parts
        assert category == again
        match = next(d for d in DISHES if d.name == dish)
        assert match.category == category
        assert name.startswith(f"Img_{match.id:03d}_")
    before = files(folder)
    capsys.readouterr()
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("reused")
    assert files(folder) == before
    assert main(["mini", str(folder), "--per-class", "3"]) == 2
    assert "holds another practice set" in capsys.readouterr().err
    assert files(folder) == before
    (folder / "images" / pictures[0]).unlink()
    assert main(words) == 2
    assert "parts missing" in capsys.readouterr().err


def test_the_same_options_write_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        assert main(["mini", str(tmp_path / name), "--per-class", "1", "--seed", "7"]) == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["mini", str(tmp_path), "--per-class", "1"]) == 2
    assert "→" in capsys.readouterr().err
    assert files(tmp_path) == {"thesis.txt": b"mine"}


@pytest.mark.parametrize("place", ["/proc/practice", "a file/practice", "n" * 300])
def test_a_folder_that_cannot_be_made_is_one_line_of_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place
) -> None:
    (tmp_path / "a file").write_text("mine")
    assert main(["mini", str(tmp_path / place), "--per-class", "1"]) == 2
    assert re.fullmatch(r"kfood mini: the practice set cannot be written to .* \(.+\) → .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
def test_a_seed_that_cannot_be_used_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    assert main(["mini", str(tmp_path / "new"), f"--seed={seed}"]) == 2
    assert f"--seed {seed} cannot be used → give a whole number" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_killed_run_completes_when_it_is_run_again(tmp_path: Path) -> None:
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "kfood_dist", "mini", str(folder), "--per-class", "6"]
    process = subprocess.Popen(command, env=environment(), start_new_session=True)
    while process.poll() is None and not list(folder.rglob("Img_*")):
        time.sleep(0.01)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "mini.json").exists() and not (folder / "images").exists()
    assert main(command[3:]) == 0
    assert main(["mini", str(whole), "--per-class", "6"]) == 0
    assert files(folder) == files(whole)


def test_the_model_loads_offline_with_the_auto_classes_and_generates(tiny_model: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model, local_files_only=True)
    for text in ("고추장진미채볶음", "꽈리고추무침 ㅎㅎ 뷁", "이 음식의 이름은?"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    model = AutoModelForImageTextToText.from_pretrained(tiny_model, local_files_only=True)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert 3e6 < sum(p.numel() for p in model.parameters()) < 5e6
    config = json.loads((tiny_model / "config.json").read_text())
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == config["image_token_id"]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    ids = tokenizer("안녕", return_tensors="pt")["input_ids"]
    assert model.generate(input_ids=ids, max_new_tokens=3).shape[1] > ids.shape[1]
    processor = AutoImageProcessor.from_pretrained(tiny_model, local_files_only=True)
    assert (processor.patch_size, processor.merge_size, processor.temporal_patch_size) == (14, 2, 2)
