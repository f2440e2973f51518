"""Files written whole and hashed, and folders that can be made."""

import hashlib
import io
import os
from contextlib import suppress
from pathlib import Path

from kfood_dist.errors import CheckpointError, KfoodError


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 text file so that a kill leaves the old one or the new one.

    Bytes of a path that are no UTF-8 become the escapes by which JSON gives them back.
    Raises CheckpointError where it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror})", "make room there, or make it writable"
        ) from None


def require_folder_possible(folder: Path | None, option: str) -> None:
    """Raise KfoodError, without making it, if an output folder could not be made or written to."""
    if folder is None:
        return
    try:
        nearest = next(
            path for path in (folder.absolute(), *folder.absolute().parents) if path.exists() or path.is_symlink()
        )
    except (OSError, ValueError) as error:  # a name too long, a folder that may not be looked into, a NUL
        why = getattr(error, "strerror", None) or error
        raise KfoodError(f"{option} {folder!s} cannot be used ({why})", "name another folder") from None
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        fault = "is not a folder" if not nearest.is_dir() else "may not be written to"
        raise KfoodError(f"{option} {folder}: {nearest} {fault}", "name another folder")


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and wait until the disk has it."""
    with open(path, "xb") as file:
        file.write(data)
        flush_to_disk(file)


def flush_to_disk(file: io.BufferedWriter) -> None:
    """Wait until the disk has what was written: a rename must not come before the bytes it publishes."""
    file.flush()
    os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until the disk has a finished file, or what a folder lists."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
