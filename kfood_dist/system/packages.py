"""Versions of the packages that this project uses."""

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
    """Return the versions of Python, this package and the packages it uses, as run.json and report.json keep them."""
    installed = {package: version(package) for package in _PACKAGES}
    return {"python": platform.python_version(), "kfood_dist": __version__, **installed}


def version(package: str) -> str | None:
    """Return the version of an installed package, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
