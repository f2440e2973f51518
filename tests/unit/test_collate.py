"""The streaming collator: pixels as in transformers, padding, refused samples and replaced samples."""

import errno
import json
import os
import shutil
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking import asking_dishes, labels_of, pictures_of
from hypothesis import given
from hypothesis import strategies as st

from kfood_dist.cli import main
from kfood_dist.data.batch.collate import substitutes
from kfood_dist.data.batch.loader import stream
from kfood_dist.data.batch.template import IGNORED
from kfood_dist.data.picture.images import decode_rgb
from kfood_dist.data.picture.patches import Patches, normalise_patches, patchify
from kfood_dist.data.picture.processed import Processed
from kfood_dist.data.plan.plan import MicroBatch
from kfood_dist.data.shards.reader import open_split
from kfood_dist.data.storage.base import UnreachableError
from kfood_dist.errors import ModelError, RecipeError, ShardError


@pytest.fixture(scope="module")
def vision(tiny_model: Path) -> Patches:
    return pictures_of(tiny_model)


@pytest.mark.parametrize("size", [(28 * n, 28 * n) for n in range(2, 33)] + [(56, 84), (448, 336)])
def test_uint8_patches_become_the_image_processors_pixels(
    tiny_model: Path, vision: Patches, size: tuple[int, int]
) -> None:
    from PIL import Image
    from transformers import AutoImageProcessor

    rgb = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    expected = AutoImageProcessor.from_pretrained(tiny_model)(images=Image.fromarray(rgb), return_tensors="pt")
    patches, facts, ids = vision.encode(rgb)
    assert patches.dtype == np.uint8
    assert facts["image_grid_thw"].tolist() == expected["image_grid_thw"].tolist()
    assert len(ids) == expected["image_grid_thw"][0].prod() // 4
    pixels = normalise_patches(torch.from_numpy(patches), vision.spec)
    assert pixels.shape == expected["pixel_values"].shape
    assert (pixels - expected["pixel_values"]).abs().max() < 1e-5


OTHER_PROCESSORS: list[dict[str, Any]] = [
    {"rescale_factor": 1 / 127.5},
    {"do_normalize": False},
    {"min_pixels": 300 * 300},
    {"max_pixels": 200 * 200},
    {"size": {"shortest_edge": 300 * 300, "longest_edge": 10**7}, "min_pixels": None, "max_pixels": None},
]


@pytest.mark.parametrize("settings", OTHER_PROCESSORS, ids=lambda settings: ",".join(settings))
def test_a_processor_that_does_more_than_patches_computes_the_pixels_itself(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, settings: dict[str, Any]
) -> None:
    from PIL import Image
    from transformers import AutoImageProcessor

    base = shutil.copytree(tiny_model, tmp_path / "model")
    path = base / "preprocessor_config.json"
    changed = {k: v for k, v in (json.loads(path.read_text()) | settings).items() if v is not None}
    path.write_text(json.dumps(changed))
    collator = asking_dishes(base, tiny_shards)
    [batch] = stream(collator, iter([MicroBatch(0, 0, (3,), 0)]), num_workers=1)

    picture = Image.fromarray(decode_rgb(collator.shards.read(3).pictures[0]))
    expected = AutoImageProcessor.from_pretrained(base)(images=picture, return_tensors="pt")
    assert isinstance(collator.template.pictures, Processed)
    shown = collator.template.pictures.to_model(batch.pixels, batch.facts | batch.shapes, batch.is_image)
    assert shown["image_grid_thw"].tolist() == expected["image_grid_thw"].tolist()
    assert shown["mm_token_type_ids"].sum() == expected["image_grid_thw"][0].prod() // 4
    assert torch.equal(shown["pixel_values"], expected["pixel_values"])


def test_a_processor_that_gives_no_patches_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "model")
    settings = {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (base / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"does not return patches with their grid.* → use a Qwen2.5-VL"):
        pictures_of(base)


def test_a_batch_pads_to_its_longest_and_masks_the_padding(
    tiny_model: Path, tiny_shards: Path, vision: Patches
) -> None:
    collator = asking_dishes(tiny_model, tiny_shards)
    names = labels_of(collator.shards)
    longest, shortest = (pick(range(len(names)), key=lambda i: len(names[i])) for pick in (max, min))
    batch = collator[MicroBatch(0, 0, (longest, shortest), longest)]
    lengths = batch.attention_mask.sum(1).tolist()
    assert lengths[0] == batch.input_ids.shape[1] > lengths[1]
    assert (batch.input_ids[1, lengths[1] :] == collator.pad_token_id).all()
    assert (batch.labels[1, lengths[1] :] == IGNORED).all()
    assert batch.num_tokens == sum(lengths)
    expected_pixels, _ = patchify(decode_rgb(collator.shards.read(shortest).pictures[0]), vision.spec)
    assert (batch.pixels[-len(expected_pixels) :].numpy() == expected_pixels).all()
    assert batch.is_image.sum(1).tolist() == [64, 64]
    label = batch.labels[0][batch.labels[0] != IGNORED]
    assert collator.template.decode(label) == names[longest]


def test_a_batch_for_generation_has_no_answers_and_pads_on_the_left(
    tiny_model: Path, tiny_shards: Path, vision: Patches
) -> None:
    batch = asking_dishes(tiny_model, tiny_shards, for_generation=True)[MicroBatch(0, 0, (0, 1), 0)]
    assert batch.num_label_tokens == 0
    assert batch.attention_mask[:, -1].all()


def test_a_sample_that_cannot_fit_is_refused_by_name_and_replaced_by_a_filler(
    tiny_model: Path, tiny_shards: Path, vision: Patches
) -> None:
    collator = asking_dishes(tiny_model, tiny_shards, max_length=66)  # 64 image tokens, and their start and end tokens
    batch = collator[MicroBatch(0, 0, (0, 1), 2)]
    why = "answer and image alone exceed data.max_length"
    assert batch.refused == ((collator.shards.key(0), why), (collator.shards.key(1), why))
    assert batch.ids == ()
    assert batch.num_label_tokens == 0
    assert batch.input_ids.shape == (1, 66)


def rot(shards: Path, *ids: int) -> None:
    """Change one bit in the pictures of these training samples."""
    split = open_split(shards, "train")
    with open(shards / split.manifest.shards_of("train")[0].path, "r+b") as tar:
        for i in ids:
            tar.seek(int(split.index["offset"][i]) + 562)
            byte = tar.read(1)[0]
            tar.seek(-1, 1)
            tar.write(bytes([byte ^ 0x10]))


@pytest.fixture
def rotten(tmp_path: Path, tiny_shards: Path) -> Path:
    """Return the packed pictures with damaged training samples 2 and 5."""
    shards = shutil.copytree(tiny_shards, tmp_path / "rotten")
    rot(shards, 2, 5)
    return shards


def test_a_damaged_sample_is_always_replaced_by_the_same_sample(
    tiny_model: Path, rotten: Path, vision: Patches
) -> None:
    collator = asking_dishes(tiny_model, rotten, unreadable="replace")
    together = collator[MicroBatch(0, 0, (1, 2, 3), 0)]
    alone = asking_dishes(tiny_model, rotten, unreadable="replace")[MicroBatch(7, 1, (2,), 4)]
    [(key, why)] = together.replaced
    assert (key, together.ids, together.refused) == (collator.shards.key(2), (1, 2, 3), ())
    assert "crc32" in why
    assert torch.equal(together.pixels[256:512], alone.pixels)
    stand_in = next(substitutes(2, len(collator.shards)))
    expected = collator[MicroBatch(0, 0, (stand_in,), 0)]
    assert torch.equal(alone.pixels, expected.pixels)
    assert torch.equal(alone.labels, expected.labels)


def test_a_damaged_substitute_is_skipped(tiny_model: Path, rotten: Path, vision: Patches) -> None:
    candidates = substitutes(2, len(open_split(rotten, "train")))
    first, second = next(candidates), next(candidates)
    rot(rotten, first)
    collator = asking_dishes(tiny_model, rotten, unreadable="replace")
    batch, expected = (collator[MicroBatch(0, 0, (i,), 0)] for i in (2, second))
    assert torch.equal(batch.pixels, expected.pixels)


def test_evaluation_stops_at_a_damaged_sample_and_validation_skips_it(
    tiny_model: Path, rotten: Path, vision: Patches
) -> None:
    with pytest.raises(ShardError, match="crc32"):
        asking_dishes(tiny_model, rotten)[MicroBatch(0, 0, (1, 2, 3), 0)]
    batch = asking_dishes(tiny_model, rotten, unreadable="refuse")[MicroBatch(0, 0, (1, 2, 3), 2)]
    assert batch.ids == (1, 3)
    assert [key for key, _ in batch.refused] == ["train-00000002"]
    assert batch.replaced == ()
    only_bad = asking_dishes(tiny_model, rotten, unreadable="refuse")[MicroBatch(0, 0, (2, 5), 2)]
    assert (only_bad.ids, only_bad.num_label_tokens, len(only_bad.refused)) == ((), 0, 2)


def test_a_sample_with_a_damaged_index_is_replaced_or_refused_by_name(
    tmp_path: Path, tiny_model: Path, pictures: Path, vision: Patches
) -> None:
    shards = tmp_path / "shards"
    assert main(["pack", str(pictures), str(shards), "--split", "1,0,0", "--shard-size", "20"]) == 0
    index = shards / "train-000001.index.npy"
    index.write_bytes(index.read_bytes()[:-1] + b"x")
    batch = asking_dishes(tiny_model, shards, unreadable="replace")[MicroBatch(0, 0, (3, 25), 0)]
    assert (batch.ids, batch.refused) == ((3, 25), ())
    [(key, why)] = batch.replaced
    assert key == "train-00000025"
    assert "train-000001.index.npy is not the index" in why
    batch = asking_dishes(tiny_model, shards, unreadable="refuse")[MicroBatch(0, 0, (3, 25), 0)]
    assert batch.ids == (3,)
    assert batch.refused == ((key, why),)


@pytest.mark.parametrize("unreadable", ["replace", "refuse", "stop"])
def test_an_unreachable_shard_is_an_error_and_its_samples_are_not_replaced(
    tmp_path: Path, tiny_model: Path, pictures: Path, vision: Patches, unreadable
) -> None:
    shards = tmp_path / "shards"
    assert main(["pack", str(pictures), str(shards), "--split", "1,0,0", "--shard-size", "20"]) == 0
    collator = asking_dishes(tiny_model, shards, unreadable=unreadable)
    assert len(collator.shards.manifest.shards) > 1
    collator[MicroBatch(0, 0, (1,), 0)]
    collator.shards.close()
    (shards / "train-000000.tar").unlink()
    with pytest.raises(UnreachableError, match=r"train-000000\.tar cannot be opened"):
        collator[MicroBatch(0, 1, (2,), 0)]


@pytest.mark.parametrize(("number", "replaced"), [(errno.EIO, True), (errno.ESTALE, False), (errno.EACCES, False)])
def test_a_bad_disk_block_counts_as_damage_and_a_lost_server_does_not(
    tiny_model: Path,
    tiny_shards: Path,
    vision: Patches,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    replaced: bool,
) -> None:
    collator = asking_dishes(tiny_model, tiny_shards, unreadable="replace")
    read, failed = os.pread, []

    def read_or_fail(*asked):
        if not failed:
            failed.append(asked)
            raise OSError(number, os.strerror(number))
        return read(*asked)

    monkeypatch.setattr(os, "pread", read_or_fail)
    if replaced:
        assert len(collator[MicroBatch(0, 0, (1,), 0)].replaced) == 1
    else:
        with pytest.raises(UnreachableError, match="cannot be read"):
            collator[MicroBatch(0, 0, (1,), 0)]
    assert failed


@given(num_samples=st.integers(2, 3000), i=st.integers(0, 2999))
def test_substitutes_are_other_samples_and_far_apart(num_samples: int, i: int) -> None:
    i %= num_samples
    tried = list(islice(substitutes(i, num_samples), 8))
    assert all(0 <= n < num_samples for n in tried)
    assert tried[0] != i
    if num_samples > 1000:
        assert len({i, *tried}) == 9
        assert min(abs(a - b) for a, b in combinations([i, *tried], 2)) > num_samples // 40


def test_an_image_size_that_is_not_a_multiple_of_a_token_is_refused(vision: Patches) -> None:
    vision.spec.require_fitting(224)
    with pytest.raises(RecipeError, match="pack with --image-size 252 or 224"):
        vision.spec.require_fitting(230)
