"""A base model's tensors, as the headers of its files tell of them, and whether they fit its config.

    folder ──► weight_files ──► headers ──► require_fitting: every tensor that the config asks for, and no other

Always holds: names are compared after transformers' own renaming of published ones; a tied head may be left out.
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from kfood_dist.errors import ModelError
from kfood_dist.model.files import INDEX, WEIGHTS

_LISTED = 5


class Tensor(NamedTuple):
    """Where a tensor lies: in `file`, from byte `begin` to byte `end`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights from: the whole model in one, else the shards of the index."""
    whole, index = folder / WEIGHTS, folder / INDEX
    if whole.is_file():
        return [whole]
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))


def headers(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a base model by its name in the files. Raises OSError, or ValueError for a damaged file."""
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > os.fstat(file.fileno()).st_size:
                raise ValueError(f"{path} is not a whole safetensors file")
            facts = json.loads(file.read(length))
        for name in facts.keys() - {"__metadata__"}:
            begin, end = facts[name]["data_offsets"]
            place = 8 + length
            shape = tuple(facts[name]["shape"])
            found[name] = Tensor(path, facts[name]["dtype"], shape, place + begin, place + end)
    return found


def require_fitting(base: str, folder: Path, config: Any) -> None:
    """Raise ModelError, with the names, unless the files hold every tensor that `config` asks for and no other.

    transformers would draw the missing ones at random, and only warns. It does the comparison here: it loads
    tensors without numbers into a model without numbers, which takes a second.
    """
    import torch
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    empty = {name: torch.empty(tensor.shape, device="meta") for name, tensor in headers(folder).items()}
    with _without_zero3():
        _, found = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)].from_pretrained(
            None,
            config=config,
            state_dict=empty,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    require_loaded(base, found)


def require_whole_packs(base: str, folder: Path) -> None:
    """Raise ModelError, with the names, unless each weight that is 4-bit in the files has all its parts and its length.

    bitsandbytes takes what is there: without its nested scales, a weight becomes another one, silently.
    """
    found = headers(folder)
    packs: dict[str, set[str]] = defaultdict(set)
    for name in found:
        module, dot, part = name.partition(".weight.")
        if dot:
            packs[f"{module}.weight"].add(f".{part}")
    parts = set().union([""], *packs.values())
    asked = [weight + part for weight in packs for part in parts]
    cut: list[tuple[str, tuple[int], tuple[int]]] = []
    for name in found.keys() & asked:
        weight, _, kind = name.partition(".quant_state.bitsandbytes__")
        if kind and weight in found:
            stands_for = math.prod(json.loads(_read(found[name]))["shape"])
            size = found[weight].end - found[weight].begin
            if size != (stands_for + 1) // 2:  # two numbers a byte
                cut.append((weight, (size,), ((stands_for + 1) // 2,)))
    missing = [name for name in asked if name not in found]
    require_loaded(base, {"missing_keys": missing, "mismatched_keys": cut, "unexpected_keys": []})


def _read(tensor: Tensor) -> bytes:
    with tensor.file.open("rb") as file:
        file.seek(tensor.begin)
        return file.read(tensor.end - tensor.begin)


def require_loaded(base: str, found: dict[str, Any]) -> None:
    """Raise ModelError, with the names, for what transformers' loading info of `base` has to tell."""
    shapes = [f"{name} is {tuple(there)}, not {tuple(asked)}" for name, there, asked in found["mismatched_keys"]]
    told = [
        words + _listed(sorted(names))
        for words, names in (
            ("it lacks ", found["missing_keys"]),
            ("", shapes),
            ("the config knows no ", found["unexpected_keys"]),
        )
        if names
    ]
    if told:
        raise ModelError(
            f"the weights of base model {base} do not fit its config: {'; '.join(told)}",
            "download the model again, or set model.base to another",
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


@contextmanager
def _without_zero3() -> Iterator[None]:
    """Let transformers load as if there was no ZeRO-3: under it, loading neither compares shapes nor names."""
    from transformers.integrations import deepspeed

    held = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held
