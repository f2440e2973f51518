"""The identity of a run's base model: its tensors and the meaning of its config, not the way in which it is saved.

    folder ──► fingerprint: names, types, shapes and first bytes of all tensors
    config.json then and now ──► config_changes: the settings that differ when the installed transformers reads both

Always holds: a model that is loaded and saved again keeps its identity, whichever release of transformers saves it.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kfood_dist.model.files import base_folder
from kfood_dist.model.tensors import headers
from kfood_dist.system.files import file_sha256

_FIRST_BYTES = 4096
# Keys that may change when the same model is saved again. `type` is the older name of `rope_type`.
_BOOKKEEPING = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "type", "use_cache"}


def fingerprint(folder: Path) -> str:
    """Return a SHA-256, in hex, over a base model's tensors: names, types, shapes, and the first 4 KiB of each.

    It does not depend on how the tensors are cut into files, nor on their metadata or order. Published names count as
    the same as those of transformers 5. A tied head counts as the same whether the files contain it or not. Not every
    byte is read, because that would mean reading all of a 3B model. A tuned model differs in each tensor.
    """
    found = {}
    for name, tensor in headers(folder).items():
        with tensor.file.open("rb") as file:
            file.seek(tensor.begin)
            first = file.read(min(tensor.end - tensor.begin, _FIRST_BYTES))
        found[_plain(name)] = [tensor.dtype, tensor.shape, hashlib.sha256(first).hexdigest()]
    if found.get("lm_head.weight") == found.get("embed_tokens.weight"):
        found.pop("lm_head.weight", None)
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()


def _plain(name: str) -> str:
    """Return a tensor's name without the prefixes of transformers releases: `visual.…`, `layers.…`, `lm_head.…`."""
    return re.sub(r"^((model|language_model)\.)+", "", name)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the base model's config.json as it is written."""
    return dict(json.loads((folder / "config.json").read_bytes()))


def config_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe in words the settings whose meaning differs between two config.json.

    The installed transformers reads both: it fills in defaults and knows the older forms. A key that only one of them
    has is ignored, because it means nothing to the model.
    """
    return list(_differing(_meaning(before), _meaning(now), ""))


def _meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import AutoConfig

    # A copy, because transformers moves keys in the mapping that it gets.
    return AutoConfig.for_model(**json.loads(json.dumps(config))).to_dict()


def _differing(before: Mapping[str, Any], now: Mapping[str, Any], path: str) -> Iterator[str]:
    for key in sorted((before.keys() & now.keys()) - _BOOKKEEPING):
        if isinstance(before[key], Mapping) and isinstance(now[key], Mapping):
            yield from _differing(before[key], now[key], f"{path}{key}.")
        elif before[key] != now[key]:
            yield f"{path}{key} was {before[key]} and is now {now[key]}"


def legacy_fingerprint(folder: Path) -> str:
    """Return the fingerprint by which an older checkpoint, one without `base_config`, identifies its base.

    It also covers the bytes of the config and of the headers.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length)
            digest.update(header)
            tensors = json.loads(header)
            for name in sorted(tensors.keys() - {"__metadata__"}):
                begin, end = tensors[name]["data_offsets"]
                file.seek(8 + length + begin)
                digest.update(file.read(min(end - begin, _FIRST_BYTES)))
    return digest.hexdigest()


# Besides the tensors: config, generation settings, tokenizer, processor settings and chat template.
_SMALL_FILES = ("*.json", "*.jinja", "*.txt")


def base_fingerprint(base: str) -> str | None:
    """Return a SHA-256, in hex, over what decides a base model's answers: the `fingerprint` and the small files.

    Returns None if the model is not on this machine.
    """
    folder = base_folder(base)
    if folder is None:
        return None
    small = sorted(file for pattern in _SMALL_FILES for file in folder.glob(pattern))
    facts = [fingerprint(folder), *([file.name, file_sha256(file)] for file in small)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def adapter_fingerprint(folder: Path) -> str:
    """Return a SHA-256, in hex, over an adapter's weights and their configuration."""
    files = ("adapter_model.safetensors", "adapter_config.json")
    return hashlib.sha256("".join(file_sha256(folder / name) for name in files).encode()).hexdigest()
