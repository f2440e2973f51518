"""Files that are written atomically or hashed, and folders that can be made."""

import hashlib
import io
import os
from contextlib import suppress
from pathlib import Path

from kfood_dist.errors import CheckpointError, KfoodError


def write_atomically(path: Path, text: str) -> None:
    """Write a UTF-8 text file. If the process is killed, the old file or the complete new one is there.

    Bytes of a path that are not UTF-8 become backslash escapes, from which JSON restores them.
    Raises CheckpointError if the file cannot be written.
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


def require_writable_folder(folder: Path | None, option: str) -> None:
    """Raise KfoodError if an output folder cannot be made or written to. Does not make the folder."""
    if folder is None:
        return
    try:
        nearest = next(
            path for path in (folder.absolute(), *folder.absolute().parents) if path.exists() or path.is_symlink()
        )
    except (OSError, ValueError) as error:  # a name too long, a folder that may not be read, a NUL
        why = getattr(error, "strerror", None) or error
        raise KfoodError(f"{option} {folder!s} cannot be used ({why})", "name another folder") from None
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        fault = "is not a folder" if not nearest.is_dir() else "is not writable"
        raise KfoodError(f"{option} {folder}: {nearest} {fault}", "name another folder")


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and wait until the disk has it."""
    with open(path, "xb") as file:
        file.write(data)
        flush_to_disk(file)


def flush_to_disk(file: io.BufferedWriter) -> None:
    """Wait until the disk has what was written, because a rename must not happen before the bytes it publishes."""
    file.flush()
    os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until the disk has a finished file, or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
