"""Find the storage that a path or a URL names.

open_storage("…/dir" | "file:///…" | "http://…" | "s3://…") ──► LocalStorage | RemoteStorage
"""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from kfood_dist.data.storage.base import Storage
from kfood_dist.data.storage.local import LocalStorage


def open_storage(where: "str | Path | Storage") -> Storage:
    """Return the storage for a folder's path or for a URL. Reads nothing.

    Raises ShardError if the protocol is unknown, if its package is not installed, or if the URL has a query or a
    fragment.
    """
    if isinstance(where, Storage):
        return where
    text = str(where)
    protocol, separator, _ = text.partition("://")
    if not separator:
        return LocalStorage(Path(where))
    if protocol in ("file", "local"):
        return LocalStorage(Path(unquote(urlsplit(text).path)))
    # Imported here, because fsspec and aiohttp take a quarter of a second to import. A local data set needs neither.
    from kfood_dist.data.storage.remote import RemoteStorage

    return RemoteStorage(text)
