"""Checkpoints: written beside, swapped in, marker last.

    engine, adapter, position ──► checkpoints/.step-00000120.partial/ ──► step-00000120/ ──► marker COMPLETE

Always holds: a folder without the marker is not a checkpoint and is never read; a kill at any instant leaves the
previous one whole, and a write that fails is given up by all ranks together; the newest and the best by validation
are never pruned. Resuming needs no random state: the loop seeds each step from (seed, step, rank).
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
from kfood_dist.system.files import file_sha256, sync, write_whole
from kfood_dist.system.world import World

FORMAT_VERSION = 2
MARKER = "COMPLETE"
STATE_FILE = "state.json"


class FileFacts(BaseModel):
    """Size in bytes and SHA-256, in hex, of one file."""

    bytes: int
    sha256: str


class Validation(BaseModel):
    """What was measured on the validation split at a checkpoint's step."""

    accuracy: float
    loss: float
    best_by: Literal["accuracy", "loss"] = "accuracy"  # the figure that makes the best checkpoint of this run

    @property
    def score(self) -> float:
        """How good it is: higher is better. A loss that is not finite is the worst."""
        score = self.accuracy if self.best_by == "accuracy" else -self.loss
        return score if math.isfinite(score) else -math.inf

    def __str__(self) -> str:
        return f"accuracy {self.accuracy:.4g}" if self.best_by == "accuracy" else f"loss {self.loss:.4g}"


class State(BaseModel):
    """`state.json`: where the run stood, what it was made with, and what lies beside."""

    format_version: int
    step: int
    data: dict[str, Any]  # the plan's position
    base_fingerprint: str
    base_config: dict[str, Any] | None = None  # None: an older checkpoint, which knows its base by the files' bytes
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
        """The small record beside the tensors. Raises CheckpointError if it is damaged or of another format."""
        try:
            raw = json.loads((self.folder / STATE_FILE).read_text(encoding="utf-8"))
            version = raw["format_version"]
            record = State.model_validate(raw) if version == FORMAT_VERSION else None
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            why = " ".join(str(error).split())[:200]
            raise CheckpointError(f"checkpoint {self.folder} has no readable {STATE_FILE} ({why})", _REMOVE) from None
        if record is None:
            raise CheckpointError(
                f"checkpoint {self.folder} has format version {version}; this is {FORMAT_VERSION}",
                "resume with the version of kfood_dist that wrote it, or start anew with another run.dir",
            )
        if record.step != self.step:
            raise CheckpointError(f"checkpoint {self.folder} is one of step {record.step}, by its own record", _REMOVE)
        return record

    def require_whole(self) -> None:
        """Raise CheckpointError unless every file is there and has the very bytes that were written."""
        for name, facts in self.record().files.items():
            path = self.folder / name
            try:
                sound = path.stat().st_size == facts.bytes and file_sha256(path) == facts.sha256
            except OSError as error:
                raise CheckpointError(f"checkpoint file {path} cannot be read ({error.strerror})", _REMOVE) from None
            if not sound:
                raise CheckpointError(f"checkpoint file {path} has not the bytes that were written", _REMOVE)


_REMOVE = "delete that checkpoint's folder; the one before it is used then, or the run starts anew"


def newest(folder: Path) -> Checkpoint | None:
    """The complete checkpoint with the most steps in `folder`, or None."""
    found = _complete(folder)
    return found[-1] if found else None


def best(folder: Path) -> tuple[Checkpoint, Validation] | None:
    """The complete checkpoint that did best on the validation split, the later of equals, and what was measured."""
    measured = [(checkpoint, _validation(checkpoint)) for checkpoint in _complete(folder)]
    found = [(checkpoint, validation) for checkpoint, validation in measured if validation is not None]
    return max(found, key=lambda pair: (pair[1].score, pair[0].step), default=None)


def save(
    folder: Path,
    step: int,
    state: dict[str, Any],
    world: World,
    write: Callable[[Checkpoint], None],
    keep: int,
) -> Checkpoint:
    """Write a checkpoint of `step` steps, make it visible at once, and prune; a collective.

    `state` is what `State` holds besides format version, step and files.
    `write` puts the tensors into the folders of the Checkpoint it is given; every rank calls it, and it may hold no
    collective after its first write. Kept are the `keep` newest and the best by `Validation.score`.
    Raises CheckpointError on every rank if any of them could not write; the checkpoints before are untouched then.
    But where that was for want of room, the newest and the best of them alone are kept.
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
        _together(world, final, begin if world.is_main else None)
        _together(world, final, lambda: write(partial))
        _together(world, final, finish if world.is_main else None)
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
    """Put what was measured later into a checkpoint's record. Raises CheckpointError if that cannot be written."""
    record = checkpoint.record().model_copy(update={"validation": validation})
    write_whole(checkpoint.folder / STATE_FILE, json.dumps(record.model_dump(), indent=2) + "\n")


def prune(folder: Path, keep: int) -> None:
    """Remove the complete checkpoints of `folder` but for the `keep` newest and the best."""
    found = best(folder)
    spared = {found[0].step} if found else set()
    for old in _complete(folder)[:-keep]:
        if old.step not in spared:
            _remove(old)


def _together(world: World, checkpoint: Checkpoint, action: Callable[[], None] | None) -> None:
    """Do this rank's part of the writing, if it has one; raise CheckpointError on all ranks if one of them failed."""
    from safetensors import SafetensorError

    fault = None
    try:
        if action is not None:
            action()
    except (OSError, SafetensorError) as error:
        fault = str(error).strip(), _is_for_room(error)
    faults = [(rank, *told) for rank, told in enumerate(world.share(fault)) if told is not None]
    if faults:
        rank, what, _ = faults[0]
        raise (_NoRoomError if any(for_room for *_, for_room in faults) else CheckpointError)(
            f"checkpoint {checkpoint.folder} could not be written (rank {rank}: {what})",
            "make room there, or make it writable; the checkpoint before it is whole",
        )


class _NoRoomError(CheckpointError):
    """A full disk, or a quota that is used up."""


def _is_for_room(error: Exception) -> bool:
    numbers = (errno.ENOSPC, errno.EDQUOT)
    # safetensors says the number in words only.
    return getattr(error, "errno", None) in numbers or any(f"os error {number})" in str(error) for number in numbers)


def _validation(checkpoint: Checkpoint) -> Validation | None:
    try:
        return checkpoint.record().validation
    except CheckpointError:  # the newest one's fault is told by whoever resumes from it
        return None


def _complete(folder: Path) -> list[Checkpoint]:
    return sorted(filter(_is_complete, _named(folder)), key=lambda checkpoint: checkpoint.step)


def _named(folder: Path) -> list[Checkpoint]:
    """The folders that are called like a checkpoint."""
    names = ((path, re.fullmatch(r"step-(\d{8,})", path.name)) for path in folder.glob("step-*"))
    return [Checkpoint(path, int(name[1])) for path, name in names if name]


def _is_complete(checkpoint: Checkpoint) -> bool:
    return (checkpoint.folder / MARKER).exists()


def _remove(checkpoint: Checkpoint) -> None:
    try:
        (checkpoint.folder / MARKER).unlink()  # first, so that a half-removed folder is not taken for a checkpoint
    except OSError:
        return  # a folder in which nothing can be removed is told when the next one is written
    shutil.rmtree(checkpoint.folder, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Bring a folder's files to the disk before its name may promise them."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)
