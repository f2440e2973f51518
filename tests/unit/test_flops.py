"""The counted FLOPs, against plain arithmetic on published sizes, and against what torch counts as it computes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking import adapted, pictures_of, plain_batch
from bases import write_llava
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from kfood_dist.config.sections import Lora, Parts
from kfood_dist.data.batch.collate import Batch
from kfood_dist.errors import ModelError
from kfood_dist.estimate.counts import Counts, count_batch
from kfood_dist.estimate.flops import Coefficients, Cost, read_coefficients
from kfood_dist.model.load import load_base
from kfood_dist.model.objective.answer import AnswerLoss
from kfood_dist.model.parts import apply_parts

CPU = torch.device("cpu")
R = 16  # rank of LoRA


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    write_llava(folder)
    return folder


def published(size: str, **parts: Any) -> Any:
    """Return a Qwen2.5-VL of published sizes on the meta device, which takes no memory, with its adapter."""
    tree = json.loads((Path(__file__).parent / f"qwen2_5_vl_{size}.json").read_text())
    tree.pop("source", None)
    with torch.device("meta"):
        base = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**tree))
        return apply_parts(base.requires_grad_(False), Parts.model_validate(parts), Lora(r=R))


def built(folder: Path, parts: dict[str, Any], **lora: Any) -> Any:
    base = load_base(str(folder), "none", "fp32", "sdpa", CPU)
    return apply_parts(base, Parts.model_validate(parts), Lora(dropout=0.0, **lora))


def one_picture() -> Batch:
    """Return a Qwen2.5-VL's batch of one picture of 224 pixels and 44 text tokens. 6 of these are the answer."""
    return plain_batch([(64, 44, 6)], torch.empty(256, 588), image_grid_thw=torch.tensor([[1, 16, 16]]))


SIZES = {  # hidden size, keys' width, inner width, layers, vocabulary
    "3b": (2048, 256, 11008, 36, 151_936),
    "7b": (3584, 512, 18944, 28, 152_064),
}
TOTALS = {  # of one picture, forward and backward
    "3b": (942_935_703_552, 618_282_221_568),
    "7b": (1_759_792_840_704, 1_434_563_149_824),
}


@pytest.mark.parametrize("size", SIZES)
def test_a_published_model_costs_what_its_sizes_say(size: str) -> None:
    hidden, keys, inner, layers, vocabulary = SIZES[size]
    tokens, labels, pairs = 64 + 44, 6, 108 * 109 // 2
    frozen = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner
    lora = R * (2 * (hidden + hidden) + 2 * (hidden + keys) + 3 * (hidden + inner))
    # The first layer's q, k and v get the embeddings, which need no gradient.
    first_frozen, first_lora = hidden * hidden + 2 * hidden * keys, 3 * R * hidden
    language_model = Cost(
        2 * tokens * layers * (frozen + lora) + 4 * hidden * layers * pairs,
        2 * tokens * (layers * (frozen + lora + lora) - first_frozen - first_lora) + 8 * hidden * layers * pairs,
    )
    head = 2 * labels * hidden * vocabulary
    # The tower has 28 layers with 4 windows of 64 patches each, and 4 layers in which all 256 attend to each other.
    linear = 1280 * 3840 + 1280 * 1280 + 3 * 1280 * 3420
    tower = 256 * 2 * (3 * 2 * 14 * 14 * 1280 + 32 * linear) + 4 * 1280 * (28 * 4 * 64**2 + 4 * 256**2)
    connector = 64 * 2 * (5120 * 5120 + 5120 * hidden)
    expected = {
        "tower": Cost(tower, 0),
        "connector": Cost(connector, 0),
        "language_model": language_model,
        "head": Cost(head, head),
    }
    model = published(size)
    counts = count_batch(one_picture(), model.config)
    assert read_coefficients(model).by_part(counts) == expected
    total = read_coefficients(model).cost(counts)
    assert (total.forward, total.backward, total.total) == (*TOTALS[size], sum(TOTALS[size]))


def test_a_full_connector_adds_its_own_gradients_and_those_of_the_first_layers_input() -> None:
    before, after = read_coefficients(published("3b")), read_coefficients(published("3b", connector="full"))
    weights = 2 * (5120 * 5120 + 5120 * 2048)
    # Both inputs need gradients too: that of the first layer comes from the norm, which trains with the connector.
    assert (before.image_token, after.image_token) == (Cost(weights, 0), Cost(weights, 2 * weights))
    q_k_v = 2 * (2048 * 2048 + 2 * 2048 * 256 + 3 * R * 2048)
    assert after.token == before.token + Cost(0, q_k_v)
    unchanged = ("causal_pair", "patch", "tower_token", "window_pair", "full_pair", "label")
    assert all(getattr(after, name) == getattr(before, name) for name in unchanged)


def test_a_llava_costs_what_its_sizes_say(llava: Path) -> None:
    """One row has two pictures of 16 patches. Only the tower sees the class token of each."""
    tokens, pairs, patches, in_tower = 32 + 10, 42 * 43 // 2, 2 * 16, 2 * 17
    frozen = 2 * (4 * 128 * 128 + 3 * 128 * 256)
    lora = 2 * R * (4 * (128 + 128) + 3 * (128 + 256))
    first = 3 * 128 * 128 + 3 * R * 128
    model = built(llava, {})
    head = 2 * 3 * 128 * model.config.text_config.vocab_size
    assert read_coefficients(model).by_part(
        count_batch(plain_batch([(32, 10, 3)], torch.empty(2, 3, 56, 56)), model.config)
    ) == {
        "tower": Cost(
            2 * patches * 3 * 14 * 14 * 64 + 2 * in_tower * 3 * (4 * 64 * 64 + 2 * 64 * 128) + 4 * 64 * 3 * 2 * 17**2
        ),
        "connector": Cost(2 * patches * (64 * 128 + 128 * 128)),
        "language_model": Cost(
            2 * tokens * (frozen + lora) + 4 * 128 * 2 * pairs,
            2 * tokens * (frozen + 2 * lora - first) + 8 * 128 * 2 * pairs,
        ),
        "head": Cost(head, head),
    }


def test_a_frozen_tower_has_no_backward_pass_and_a_trained_one_has(tiny_model: Path) -> None:
    frozen, lora, full = (read_coefficients(built(tiny_model, {"tower": way})) for way in ("frozen", "lora", "full"))
    for name in ("patch", "tower_token", "window_pair", "full_pair", "image_token"):
        assert getattr(frozen, name).backward == 0, name
    # The connector passes gradients on to a LoRA in the tower. Its own weights stay frozen.
    assert lora.image_token == Cost(lora.image_token.forward, lora.image_token.forward)
    assert lora.patch == frozen.patch
    assert lora.window_pair == Cost(frozen.window_pair.forward, 2 * frozen.window_pair.forward)
    assert full.patch == Cost(frozen.patch.forward, frozen.patch.forward)
    assert full.tower_token == Cost(frozen.tower_token.forward, 2 * frozen.tower_token.forward)


def test_a_4_bit_model_and_one_whose_weights_are_elsewhere_cost_the_same(tiny_model: Path) -> None:
    plain, quantized = adapted(tiny_model, "none", "bf16"), adapted(tiny_model, "nf4", "bf16")
    expected = read_coefficients(plain)
    assert read_coefficients(quantized) == expected
    for parameter in plain.parameters():
        parameter.data = torch.empty(0)  # as ZeRO-3 leaves it between its uses
    assert read_coefficients(plain) == expected


def test_a_layer_of_no_part_is_an_error_and_a_plain_base_has_no_backward_pass(tiny_model: Path) -> None:
    base = load_base(str(tiny_model), "none", "fp32", "sdpa", CPU)
    coefficients = read_coefficients(base)
    assert all(cost.backward == 0 < cost.forward for cost in vars(coefficients).values())
    base.value_head = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"value_head belongs to no known part of a Qwen2\.5-VL"):
        read_coefficients(base)


# How parts train, and which layers get LoRA.
WAYS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({}, {"target_modules": ("q_proj", "v_proj")}),
    ({}, {"target_modules": ("v_proj",)}),
    ({}, {"target_modules": ("k_proj", "up_proj")}),
    ({}, {"target_modules": ("down_proj",)}),
    ({"connector": "full"}, {}),
    ({"connector": "lora"}, {}),
    ({"language_model": "frozen", "connector": "lora"}, {}),
    ({"language_model": "full"}, {}),
    ({"tower": "lora"}, {}),
    ({"tower": "full", "connector": "full"}, {}),
]


CASES = [
    (family, *way) for family in ("qwen2_5_vl", "llava") for way in WAYS if family != "llava" or "tower" not in way[0]
]


@pytest.mark.parametrize(("family", "parts", "lora"), CASES, ids=str)
def test_torch_counts_the_same_as_it_computes(
    tiny_model: Path, llava: Path, family: str, parts: dict[str, Any], lora: dict[str, Any]
) -> None:
    """It differs in one thing: it computes all pairs of a row, and masks the later keys.

    A LLaVA's first connector layer counts as a batch of products (bmm), because its input is a slice.
    """
    base, image_size = {"qwen2_5_vl": (tiny_model, 280), "llava": (llava, 56)}[family]
    model, batch = built(base, parts, **lora), drawn_batch(base, image_size)
    forward, backward = measured(AnswerLoss(model, pictures_of(base)), batch)
    coefficients, counts = read_coefficients(model), count_batch(batch, model.config)
    num_masked_pairs = batch.input_ids.shape[1] ** 2 * len(batch.input_ids) - counts.num_causal_pairs
    if family == "qwen2_5_vl":
        linears = linear_part(coefficients, counts)
        assert (forward["mm"], backward["mm"]) == (linears.forward, linears.backward)
    total = coefficients.cost(counts) + coefficients.causal_pair * num_masked_pairs
    assert (sum(forward.values()), sum(backward.values())) == (total.forward, total.backward)


def linear_part(coefficients: Coefficients, counts: Counts) -> Cost:
    return (
        coefficients.token * counts.num_tokens
        + coefficients.tower_token * counts.num_tower_tokens
        + coefficients.image_token * counts.num_image_tokens
        + coefficients.label * counts.num_labels
    )


def measured(loss: AnswerLoss, batch: Batch) -> tuple[dict[str, int], dict[str, int]]:
    """Return the FLOPs that torch counts in the forward and backward pass, of linear layers (mm) and of all others."""
    with sdpa_kernel(SDPBackend.MATH):  # other kernels on a CPU have no formula in torch
        with FlopCounterMode(display=False) as forward:
            summed = loss(batch)[0]
        with FlopCounterMode(display=False) as backward:
            summed.backward()
    found = []
    for mode in (forward, backward):
        counts = {str(operation): number for operation, number in mode.get_flop_counts()["Global"].items()}
        linear = counts.pop("aten.mm", 0) + counts.pop("aten.addmm", 0)
        found.append({"mm": linear, **counts})
    return found[0], found[1]


def drawn_batch(base: Path, image_size: int) -> Batch:
    """Return a batch of two rows of one length, each with a picture, 12 text tokens and 3 labels."""
    pictures = pictures_of(base, image_size)
    shown = [pictures.encode(np.full((image_size, image_size, 3), shade, dtype=np.uint8)) for shade in (50, 200)]
    facts = {name: torch.from_numpy(np.concatenate([one.facts[name] for one in shown])) for name in shown[0].facts}
    pixels = torch.from_numpy(np.concatenate([one.pixels for one in shown]))
    batch = plain_batch([(len(one.ids), 12, 3) for one in shown], pixels, **facts)
    batch.input_ids[batch.is_image.bool()] = pictures.image_token
    return batch
