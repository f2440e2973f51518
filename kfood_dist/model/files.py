"""Where a base model's files are, and whether they are complete. Reads only headers, so a 72B model takes a second.

    model.base ──► require_base ──► a complete folder, a complete snapshot in the hub's cache, or a hub that answers
              └──► located ──► what every load gets: that folder, or the hub name until it is downloaded

Always holds: a hub name whose snapshot is complete in the cache is read from there, without any network access.
"""

import json
import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kfood_dist.errors import ModelError
from kfood_dist.model.family import require_supported

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HUB_TIMEOUT_S = 5.0

# Each line is one need besides config.json and the weights. Any one of its files, or of its pairs of files, is enough.
_SMALL_FILES: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("tokenizer_config.json",),),
    (("tokenizer.json",), ("vocab.json", "merges.txt")),
    (("preprocessor_config.json",), ("processor_config.json",)),
)
_TEMPLATES = ("chat_template.jinja", "chat_template.json")  # optional; if one exists, it is read
_POINTER = b"version https://git-lfs"
_MISSING = "is missing"
_SHOWN = 4


@dataclass(frozen=True)
class Fault:
    """One file with a fault. `what` continues a sentence that begins with its name, such as "is empty"."""

    name: str
    what: str


def require_base(base: str) -> None:
    """Raise ModelError, within seconds, unless `base` is complete in a folder or in the hub's cache, or is on the hub.

    Complete means: every file that loading needs exists, and every shard of the index has its header, its full length
    and the tensors that the index maps to it. Also raises ModelError for a model type that was not tested.
    """
    folder = Path(base)
    if os.path.isdir(folder):  # also False for a text that cannot be a path
        _require_type(base, folder)  # first: a text model is not an incomplete folder
        _refuse(f"base model folder {folder}", list(find_faults(folder)), _folder_remedy(folder))
    elif folder.is_absolute() or base.startswith((".", "~")) or base.count("/") != 1:
        raise ModelError(
            f"base model folder {folder} does not exist",
            "set model.base to a folder that holds config.json and *.safetensors, or to a hub name like owner/name",
        )
    elif snapshot := _snapshot(base):
        _require_snapshot(base, snapshot)
    elif reason := _ask_hub(base):
        raise ModelError(
            f"base model '{base}' is neither a folder here, nor in the hub cache, nor reachable on the hub ({reason})",
            f"check the name, or on a machine with access run `hf download {base} --local-dir DIR`, copy DIR here "
            "and set model.base=DIR",
        )


def _require_type(base: str, folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # reported later: as a fault of the file, or when it is read
        return
    if isinstance(config, dict):
        require_supported(base, config.get("model_type"))


def base_folder(base: str) -> Path | None:
    """Return where the files of `base` are here: its folder, or its complete snapshot in the hub's cache, or None."""
    if os.path.isdir(base):
        return Path(base)
    snapshot = _snapshot(base)
    return snapshot if snapshot and not any(_snapshot_faults(snapshot)) else None


def fetched_folder(base: str) -> Path:
    """Return where the files of `base` are here, with its weights. Downloads them if they are only on the hub."""
    if folder := base_folder(base):
        return folder
    import huggingface_hub

    return Path(huggingface_hub.snapshot_download(base, allow_patterns=["*.json", "*.jinja", "*.txt", "*.safetensors"]))


def located(base: str) -> str:
    """Return what transformers gets to load `base`: the folder of its files, or its hub name if they are not here."""
    return str(base_folder(base) or base)


def find_faults(folder: Path) -> Iterator[Fault]:
    """Yield what prevents loading the model in `folder`, file by file. Yields nothing if the folder is complete."""
    if fault := _file_fault(folder / "config.json"):
        yield fault
    if (folder / WEIGHTS).exists():  # transformers prefers it to an index
        yield from _shard_faults(folder / WEIGHTS, set())
    elif (folder / INDEX).exists():
        yield from _index_faults(folder)
    else:
        yield Fault("*.safetensors", _MISSING)
    for choices in _SMALL_FILES:
        faults = [[fault for name in names if (fault := _file_fault(folder / name))] for names in choices]
        if all(faults):  # then report a choice that exists but is damaged, else the first
            yield from next((found for found in faults if any(f.what != _MISSING for f in found)), faults[0])
    templates = (_file_fault(folder / name) for name in _TEMPLATES)
    yield from (fault for fault in templates if fault and fault.what != _MISSING)


def _index_faults(folder: Path) -> Iterator[Fault]:
    fault = _file_fault(folder / INDEX)
    tensors: dict[str, set[str]] = defaultdict(set)
    try:
        for tensor, shard in json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].items():
            tensors[str(shard)].add(tensor)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        fault = fault or Fault(INDEX, "is damaged")
    if fault or not tensors:
        yield fault or Fault(INDEX, "names no tensors")
    for shard, names in sorted(tensors.items()):
        yield from _shard_faults(folder / shard, names)


def _shard_faults(path: Path, wanted: set[str]) -> Iterator[Fault]:
    """Yield the faults of one safetensors file. The library checks that its header, offsets and size agree."""
    from safetensors import SafetensorError, safe_open

    if fault := _file_fault(path):
        yield fault
        return
    try:
        with safe_open(path, "np") as file:
            lacking = sorted(wanted.difference(file.keys()))
    except (OSError, SafetensorError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        yield Fault(path.name, f"is cut off or damaged ({reason})")
        return
    if lacking:
        yield Fault(path.name, f"lacks {lacking[0]}, which the index maps to it ({len(lacking)} such tensors)")


def _file_fault(path: Path) -> Fault | None:
    try:
        with path.open("rb") as file:
            head = file.read(len(_POINTER))
    except FileNotFoundError:  # also for a link in the cache whose target is missing
        return Fault(path.name, _MISSING)
    except OSError as error:
        return Fault(path.name, f"cannot be read ({error.strerror})")
    if not head:
        return Fault(path.name, "is empty")
    return Fault(path.name, "is a git-lfs pointer, not the file itself") if head == _POINTER else None


def _refuse(where: str, faults: list[Fault], remedy: str) -> None:
    """Raise ModelError if there are faults. Missing files are listed as one fault."""
    missing = [fault.name for fault in faults if fault.what == _MISSING]
    problems = [f"lacks {_listed(missing)}"] if missing else []
    problems += [f"{fault.name} {fault.what}" for fault in faults if fault.what != _MISSING][:_SHOWN]
    if problems:
        raise ModelError(f"{where} is incomplete: {'; '.join(problems)}", remedy)


def _listed(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _folder_remedy(folder: Path) -> str:
    return (
        f"complete the download: `hf download OWNER/NAME --local-dir {folder}`, or `git lfs pull` in a git checkout; "
        "or set model.base to another folder"
    )


def _require_snapshot(name: str, snapshot: Path) -> None:
    """Raise ModelError if a snapshot has damaged files, or lacks files and the hub cannot be reached."""
    _require_type(name, snapshot)
    faults = list(_snapshot_faults(snapshot))
    where = f"base model '{name}' in the hub cache ({snapshot})"
    if damaged := sorted({fault.name for fault in faults if fault.what != _MISSING}):
        # The hub's client treats an existing file as complete, and would not download it again by itself.
        _refuse(where, faults, f"download them again: `hf download {name} {' '.join(damaged)} --force-download`")
    if faults and (reason := _ask_hub(name)):
        remedy = f"complete the download on a machine that reaches the hub: `hf download {name}`"
        _refuse(where, faults, f"{remedy} (from here: {reason})")


def _snapshot_faults(snapshot: Path) -> Iterator[Fault]:
    """Yield the faults of a snapshot. Without a chat template it is incomplete, because the hub may still have one."""
    yield from find_faults(snapshot)
    configs = [snapshot / name for name in ("tokenizer_config.json", "processor_config.json")]
    kept = [snapshot / name for name in (*_TEMPLATES, "additional_chat_templates")]
    inside = any(b'"chat_template"' in path.read_bytes() for path in configs if path.is_file())
    if not inside and not any(path.exists() for path in kept):
        yield Fault("its chat template", _MISSING)


def _snapshot(name: str) -> Path | None:
    """Return the folder in the hub's cache with the files of `name` that were downloaded so far, or None."""
    from huggingface_hub import constants

    repository = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    try:
        snapshot = repository / "snapshots" / (repository / "refs" / "main").read_text(encoding="utf-8").strip()
        return snapshot if snapshot.is_dir() else None
    except (OSError, ValueError):  # no such folder, or a name that cannot be one
        return None


def _ask_hub(name: str) -> str | None:
    """Return why the hub does not give `name`, or None if it does.

    Waits at most HUB_TIMEOUT_S, even if a name server does not answer.
    """
    import huggingface_hub

    reasons: list[str | None] = []

    def ask() -> None:
        try:
            huggingface_hub.HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
            reasons.append(None)
        except Exception as error:  # the errors have no common base class; all mean: not available
            reasons.append(type(error).__name__)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    return reasons[0] if reasons else f"no answer in {HUB_TIMEOUT_S:.0f} s"
