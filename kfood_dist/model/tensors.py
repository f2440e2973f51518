"""A base model's tensors, as the headers of its files describe them, and whether they fit its config.

    folder ──► weight_files ──► headers ──► require_fitting: every tensor that the config asks for, and no other

Always holds: names are compared after transformers has renamed the published ones. A tied head may be missing.
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
    """Where a tensor is: in `file`, from byte `begin` up to, but not including, byte `end`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers reads: the single file, else the shards of the index, else all."""
    whole, index = folder / WEIGHTS, folder / INDEX
    if whole.is_file():
        return [whole]
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))


def headers(folder: Path) -> dict[str, Tensor]:
    """Return each tensor of a base model by its name in the files. Raises OSError, or ValueError for a damaged file."""
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > os.fstat(file.fileno()).st_size:
                raise ValueError(f"{path} is not a complete safetensors file")
            facts = json.loads(file.read(length))
        for name in facts.keys() - {"__metadata__"}:
            begin, end = facts[name]["data_offsets"]
            place = 8 + length
            shape = tuple(facts[name]["shape"])
            found[name] = Tensor(path, facts[name]["dtype"], shape, place + begin, place + end)
    return found


def require_fitting(base: str, folder: Path, config: Any) -> None:
    """Raise ModelError, with the names, unless the files hold every tensor that `config` asks for and no other.

    By itself, transformers only warns, and fills missing tensors with random numbers. It also does the comparison here:
    it loads tensors without data into a model without data, which takes a second.
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


def require_complete_4bit(base: str, folder: Path) -> None:
    """Raise ModelError, with the names, unless each weight that is 4-bit in the files has all its parts and its length.

    bitsandbytes uses the parts that exist: without its nested scales, a weight gets other values, without a warning.
    """
    found = headers(folder)
    packs: dict[str, set[str]] = defaultdict(set)
    for name in found:
        module, dot, part = name.partition(".weight.")
        if dot:
            packs[f"{module}.weight"].add(f".{part}")
    parts = set().union([""], *packs.values())
    expected = [weight + part for weight in packs for part in parts]
    cut: list[tuple[str, tuple[int], tuple[int]]] = []
    for name in found.keys() & expected:
        weight, _, kind = name.partition(".quant_state.bitsandbytes__")
        if kind and weight in found:
            stands_for = math.prod(json.loads(_read(found[name]))["shape"])
            size = found[weight].end - found[weight].begin
            if size != (stands_for + 1) // 2:  # two numbers per byte
                cut.append((weight, (size,), ((stands_for + 1) // 2,)))
    missing = [name for name in expected if name not in found]
    require_loaded(base, {"missing_keys": missing, "mismatched_keys": cut, "unexpected_keys": []})


def _read(tensor: Tensor) -> bytes:
    with tensor.file.open("rb") as file:
        file.seek(tensor.begin)
        return file.read(tensor.end - tensor.begin)


def require_loaded(base: str, found: dict[str, Any]) -> None:
    """Raise ModelError, with the names, if transformers' loading info of `base` lists a fault."""
    shapes = [f"{name} is {tuple(there)}, not {tuple(expected)}" for name, there, expected in found["mismatched_keys"]]
    faults = [
        words + _listed(sorted(names))
        for words, names in (
            ("it lacks ", found["missing_keys"]),
            ("", shapes),
            ("the config does not have ", found["unexpected_keys"]),
        )
        if names
    ]
    if faults:
        raise ModelError(
            f"the weights of base model {base} do not fit its config: {'; '.join(faults)}",
            "download the model again, or set model.base to another",
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


@contextmanager
def _without_zero3() -> Iterator[None]:
    """Let transformers load as if there were no ZeRO-3. Under ZeRO-3, loading compares neither shapes nor names."""
    from transformers.integrations import deepspeed

    held = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held
