"""Checkpoints: written beside, swapped in, marker last.

    engine, adapter, position ──► checkpoints/.step-00000120.partial/ ──► step-00000120/ ──► marker COMPLETE

Always holds: a folder without the marker is not a checkpoint and is never read; a kill at any instant leaves the
previous one whole. Resuming needs no random state: the loop seeds each step from (seed, step, rank).
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfood_dist.errors import CheckpointError
from kfood_dist.runtime import World

FORMAT_VERSION = 1
MARKER = "COMPLETE"
STATE_FILE = "state.json"


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

    def state(self) -> dict[str, Any]:
        """The small record beside the tensors: format version, step, data position, how it was written."""
        try:
            state = json.loads((self.folder / STATE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint {self.folder} has no readable {STATE_FILE} ({error})",
                "delete that folder and start again",
            ) from None
        if state.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"checkpoint {self.folder} has format version {state.get('format_version')}; this is {FORMAT_VERSION}",
                "resume with the version of kfood_dist that wrote it, or start anew with another run.dir",
            )
        return state


def newest(folder: Path) -> Checkpoint | None:
    """The complete checkpoint with the most steps in `folder`, or None."""
    found = _complete(folder)
    return found[-1] if found else None


def save(
    folder: Path,
    step: int,
    state: dict[str, Any],
    world: World,
    write: Callable[[Checkpoint], None],
    keep: int,
) -> Checkpoint:
    """Write a checkpoint of `step` steps, make it visible at once, and prune to the `keep` newest.

    `write` puts the tensors into the folders of the Checkpoint it is given; every rank calls it. A collective.
    """
    partial = Checkpoint(folder / f".step-{step:08d}.partial", step)
    final = Checkpoint(folder / f"step-{step:08d}", step)
    if world.is_main:
        for leftover in (*folder.glob(".step-*.partial"), final.folder):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.engine.mkdir(parents=True)
    world.barrier()
    write(partial)
    world.barrier()
    if world.is_main:
        record = {"format_version": FORMAT_VERSION, "step": step, **state}
        (partial.folder / STATE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        _sync(partial.folder)
        partial.folder.rename(final.folder)
        (final.folder / MARKER).touch()
        _sync(final.folder)
        _sync_one(folder)
        for old in _complete(folder)[:-keep]:
            _remove(old)
    world.barrier()
    return final


def _complete(folder: Path) -> list[Checkpoint]:
    names = (
        (marker.parent, re.fullmatch(r"step-(\d{8,})", marker.parent.name)) for marker in folder.glob(f"*/{MARKER}")
    )
    return sorted((Checkpoint(path, int(name[1])) for path, name in names if name), key=lambda c: c.step)


def _remove(checkpoint: Checkpoint) -> None:
    (checkpoint.folder / MARKER).unlink()  # first, so that a half-removed folder is not taken for a checkpoint
    shutil.rmtree(checkpoint.folder)


def _sync(folder: Path) -> None:
    """Bring a folder's files to the disk before its name may promise them."""
    for path in [*folder.rglob("*"), folder]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
