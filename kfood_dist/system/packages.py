"""Versions of what this package builds on."""

import importlib.metadata
import platform

from kfood_dist import __version__

_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "deepspeed",
    "webdataset",
    "numpy",
    "pillow",
)


def all_versions() -> dict[str, str | None]:
    """Versions of Python, this package and what it builds on, as run.json and report.json keep them."""
    installed = {package: version(package) for package in _PACKAGES}
    return {"python": platform.python_version(), "kfood_dist": __version__, **installed}


def version(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
