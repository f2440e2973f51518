"""What a batch holds, in the units that FLOPs are counted in."""

from pathlib import Path

import torch
from asking import asking_dishes, plain_batch

from kfood_dist.data.plan.plan import MicroBatch
from kfood_dist.estimate.counts import Counts, count_batch
from kfood_dist.model.base import load_config


def test_pairs_are_causal_and_padding_counts_nowhere(tiny_model: Path) -> None:
    config = load_config(str(tiny_model))
    rows = [(64, 10, 3), (128, 30, 5)]  # the second row has two pictures
    batch = plain_batch(rows, torch.empty(768, 588), image_grid_thw=torch.tensor([[1, 16, 16]] * 3))
    assert batch.input_ids.shape == (2, 158)
    assert count_batch(batch, config) == Counts(
        num_tokens=74 + 158,
        num_causal_pairs=74 * 75 // 2 + 158 * 159 // 2,
        num_patches=768,
        num_tower_tokens=768,
        num_window_pairs=3 * 4 * 64**2,
        num_full_pairs=3 * 256**2,
        num_image_tokens=192,
        num_labels=8,
    )
    alone = [plain_batch([row], torch.empty(256 * n, 588), image_grid_thw=torch.tensor([[1, 16, 16]] * n))
             for row, n in zip(rows, (1, 2), strict=True)]  # fmt: skip
    assert sum((count_batch(one, config) for one in alone), Counts()) == count_batch(batch, config)


def test_windows_at_the_border_are_smaller(tiny_model: Path) -> None:
    """A picture of 20 × 12 patches has windows of 8, 8 and 4 patches by 8 and 4."""
    batch = plain_batch([(60, 5, 1)], torch.empty(240, 588), image_grid_thw=torch.tensor([[1, 20, 12]]))
    counts = count_batch(batch, load_config(str(tiny_model)))
    assert counts.num_window_pairs == sum((a * b) ** 2 for a in (8, 8, 4) for b in (8, 4))
    assert counts.num_full_pairs == 240**2


def test_a_batch_of_the_collator_is_counted_and_one_without_labels_is_not(tiny_model: Path, tiny_shards: Path) -> None:
    config = load_config(str(tiny_model))
    batch = asking_dishes(tiny_model, tiny_shards)[MicroBatch(0, 0, (0, 1, 2), 0)]
    counts = count_batch(batch, config)
    assert (counts.num_tokens, counts.num_labels) == (batch.num_tokens, batch.num_label_tokens)
    assert (counts.num_patches, counts.num_image_tokens) == (len(batch.pixels), int(batch.is_image.sum()))
    filler = asking_dishes(tiny_model, tiny_shards, max_length=66, unreadable="refuse")[MicroBatch(0, 0, (0,), 0)]
    assert filler.num_tokens and count_batch(filler, config) == Counts()
