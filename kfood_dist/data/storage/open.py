"""Finds the storage that a path or a URL names.

open_storage("…/dir" | "file:///…" | "http://…" | "s3://…") ──► LocalStorage | RemoteStorage
"""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from kfood_dist.data.storage.base import Storage
from kfood_dist.data.storage.local import LocalStorage


def open_storage(where: "str | Path | Storage") -> Storage:
    """The storage of a folder's path or of a URL; reads nothing.

    Raises ShardError for a protocol that is unknown or whose package is not installed.
    """
    if isinstance(where, Storage):
        return where
    text = str(where)
    protocol, separator, _ = text.partition("://")
    if not separator:
        return LocalStorage(Path(where))
    if protocol in ("file", "local"):
        return LocalStorage(Path(unquote(urlsplit(text).path)))
    # Here, not above: fsspec and aiohttp take a quarter of a second that a local data set need not pay.
    from kfood_dist.data.storage.remote import RemoteStorage

    return RemoteStorage(text)
