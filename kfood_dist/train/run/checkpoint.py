"""Checkpoints. Each is written under a temporary name, renamed, and marked as complete last.

    engine, adapter, position ──► checkpoints/.step-00000120.partial/ ──► step-00000120/ ──► marker COMPLETE

Always holds: a folder without the marker is not a checkpoint and is never read. A kill at any moment leaves the
checkpoint before it complete. If a write fails, all ranks give it up together. The newest checkpoint and the best by
validation are never pruned. A resume needs no random state, because the loop seeds each step from (seed, step, rank).
"""

import errno
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from kfood_dist.errors import CheckpointError
from kfood_dist.system.files import file_sha256, sync, write_atomically
from kfood_dist.system.world import World

FORMAT_VERSION = 2
MARKER = "COMPLETE"
STATE_FILE = "state.json"


class FileFacts(BaseModel):
    """Size in bytes and SHA-256, in hex, of one file."""

    bytes: int
    sha256: str


class Validation(BaseModel):
    """The result of the evaluation on the validation split at a checkpoint's step."""

    accuracy: float
    loss: float
    best_by: Literal["accuracy", "loss"] = "accuracy"  # the value that decides the best checkpoint of this run

    @property
    def score(self) -> float:
        """How good it is: higher is better. A loss that is not finite is the worst."""
        score = self.accuracy if self.best_by == "accuracy" else -self.loss
        return score if math.isfinite(score) else -math.inf

    def __str__(self) -> str:
        return f"accuracy {self.accuracy:.4g}" if self.best_by == "accuracy" else f"loss {self.loss:.4g}"


class State(BaseModel):
    """The content of `state.json`: the position of the run, what it was trained with, and the checkpoint's files."""

    format_version: int
    step: int
    data: dict[str, Any]  # the plan's position
    base_fingerprint: str
    base_config: dict[str, Any] | None = None  # None: an older checkpoint, with a fingerprint of the files' bytes
    world_size: int
    distributed_type: str
    zero_stage: int
    validation: Validation | None = None
    bad: dict[str, str] = {}  # samples that could not be read so far, and why
    files: dict[str, FileFacts]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint of `step` optimiser steps."""

    folder: Path
    step: int

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def engine(self) -> Path:
        return self.folder / "engine"

    def record(self) -> State:
        """Read the small record beside the tensors. Raises CheckpointError if it is damaged or of another format."""
        try:
            raw = json.loads((self.folder / STATE_FILE).read_text(encoding="utf-8"))
            version = raw["format_version"]
            record = State.model_validate(raw) if version == FORMAT_VERSION else None
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            why = " ".join(str(error).split())[:200]
            raise CheckpointError(f"checkpoint {self.folder} has no readable {STATE_FILE} ({why})", _REMOVE) from None
        if record is None:
            raise CheckpointError(
                f"checkpoint {self.folder} has format version {version}; this program reads {FORMAT_VERSION}",
                "resume with the version of kfood_dist that wrote it, or start a new run with another run.dir",
            )
        if record.step != self.step:
            raise CheckpointError(f"checkpoint {self.folder} is of step {record.step} by its own record", _REMOVE)
        return record

    def require_undamaged(self) -> None:
        """Raise CheckpointError unless every file is there and has exactly the bytes that were written."""
        for name, facts in self.record().files.items():
            path = self.folder / name
            try:
                sound = path.stat().st_size == facts.bytes and file_sha256(path) == facts.sha256
            except OSError as error:
                raise CheckpointError(f"checkpoint file {path} cannot be read ({error.strerror})", _REMOVE) from None
            if not sound:
                raise CheckpointError(f"checkpoint file {path} does not have the bytes that were written", _REMOVE)


_REMOVE = "delete that checkpoint's folder; the run then uses the one before it, or starts from the beginning"


def newest(folder: Path) -> Checkpoint | None:
    """Return the complete checkpoint with the most steps in `folder`, or None."""
    found = _complete(folder)
    return found[-1] if found else None


def best(folder: Path) -> tuple[Checkpoint, Validation] | None:
    """Return the complete checkpoint with the best validation, and that validation. Of equals, it is the later one.

    Returns None if none was evaluated.
    """
    evaluated = [(checkpoint, _validation(checkpoint)) for checkpoint in _complete(folder)]
    found = [(checkpoint, validation) for checkpoint, validation in evaluated if validation is not None]
    return max(found, key=lambda pair: (pair[1].score, pair[0].step), default=None)


def save(
    folder: Path,
    step: int,
    state: dict[str, Any],
    world: World,
    write: Callable[[Checkpoint], None],
    keep: int,
) -> Checkpoint:
    """Write a checkpoint of `step` steps, make it visible with an atomic rename, and prune. A collective.

    `state` has the fields of `State` except format version, step and files.
    `write` puts the tensors into the folders of the Checkpoint that it gets. Every rank calls it, and it must not enter
    a collective after its first write.
    The `keep` newest checkpoints and the best by `Validation.score` are kept.

    Raises CheckpointError on every rank if any rank cannot write. The earlier checkpoints then stay as they are. But if
    the disk is full, only the newest and the best of them are kept.
    """
    partial = Checkpoint(folder / f".step-{step:08d}.partial", step)
    final = Checkpoint(folder / f"step-{step:08d}", step)

    def begin() -> None:
        unmarked = [found.folder for found in _named(folder) if not _is_complete(found)]
        for leftover in (*folder.glob(".step-*.partial"), *unmarked, final.folder):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.engine.mkdir(parents=True)

    def finish() -> None:
        files = {
            str(path.relative_to(partial.folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(partial.folder.rglob("*"))
            if path.is_file()
        }
        record = {"format_version": FORMAT_VERSION, "step": step, **state, "files": files}
        (partial.folder / STATE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        _sync(partial.folder)
        partial.folder.rename(final.folder)
        (final.folder / MARKER).touch()
        _sync(final.folder)
        sync(folder)

    try:
        _on_all_ranks(world, final, begin if world.is_main else None)
        _on_all_ranks(world, final, lambda: write(partial))
        _on_all_ranks(world, final, finish if world.is_main else None)
    except CheckpointError as error:
        if world.is_main:
            shutil.rmtree(partial.folder, ignore_errors=True)
            if isinstance(error, _NoRoomError):
                prune(folder, keep=1)
        raise
    if world.is_main:
        prune(folder, keep)
    world.barrier()
    return final


def add_validation(checkpoint: Checkpoint, validation: Validation) -> None:
    """Add a later validation to a checkpoint's record. Raises CheckpointError if the record cannot be written."""
    record = checkpoint.record().model_copy(update={"validation": validation})
    write_atomically(checkpoint.folder / STATE_FILE, json.dumps(record.model_dump(), indent=2) + "\n")


def prune(folder: Path, keep: int) -> None:
    """Remove the complete checkpoints of `folder`, except the `keep` newest and the best."""
    found = best(folder)
    spared = {found[0].step} if found else set()
    for old in _complete(folder)[:-keep]:
        if old.step not in spared:
            _remove(old)


def _on_all_ranks(world: World, checkpoint: Checkpoint, action: Callable[[], None] | None) -> None:
    """Do this rank's part of the writing, if it has one. Raises CheckpointError on all ranks if one of them fails."""
    from safetensors import SafetensorError

    fault = None
    try:
        if action is not None:
            action()
    except (OSError, SafetensorError) as error:
        fault = str(error).strip(), _is_disk_full(error)
    faults = [(rank, *found) for rank, found in enumerate(world.all_gather(fault)) if found is not None]
    if faults:
        rank, what, _ = faults[0]
        raise (_NoRoomError if any(for_room for *_, for_room in faults) else CheckpointError)(
            f"checkpoint {checkpoint.folder} could not be written (rank {rank}: {what})",
            "make room there, or make it writable; the checkpoint before it is complete",
        )


class _NoRoomError(CheckpointError):
    """A full disk, or a quota that is used up."""


def _is_disk_full(error: Exception) -> bool:
    numbers = (errno.ENOSPC, errno.EDQUOT)
    # safetensors gives the number only in the text of its error.
    return getattr(error, "errno", None) in numbers or any(f"os error {number})" in str(error) for number in numbers)


def _validation(checkpoint: Checkpoint) -> Validation | None:
    try:
        return checkpoint.record().validation
    except CheckpointError:  # a resume from the newest one reports its damage
        return None


def _complete(folder: Path) -> list[Checkpoint]:
    return sorted(filter(_is_complete, _named(folder)), key=lambda checkpoint: checkpoint.step)


def _named(folder: Path) -> list[Checkpoint]:
    """Return the folders that are named like a checkpoint, as Checkpoints."""
    names = ((path, re.fullmatch(r"step-(\d{8,})", path.name)) for path in folder.glob("step-*"))
    return [Checkpoint(path, int(name[1])) for path, name in names if name]


def _is_complete(checkpoint: Checkpoint) -> bool:
    return (checkpoint.folder / MARKER).exists()


def _remove(checkpoint: Checkpoint) -> None:
    try:
        (checkpoint.folder / MARKER).unlink()  # first, so that a partly removed folder does not count as a checkpoint
    except OSError:
        return  # if nothing can be removed here, the next write reports it
    shutil.rmtree(checkpoint.folder, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Flush a folder and all its files to the disk, before its name or its marker says that they are there."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)
