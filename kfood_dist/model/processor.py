"""The model's prompt and its pictures: all that is known before weights are loaded, checked to fit together.

base's config, tokenizer, processor settings ──► build_template ──► Template, ready to encode
manifest of packed pictures                  ──► require_same_pictures
"""

from pathlib import Path
from typing import Any, Protocol

from kfood_dist.data.batch.template import ReservedToken, SampleTooLong, Template
from kfood_dist.data.shards.manifest import Manifest
from kfood_dist.data.task.table import build_task
from kfood_dist.errors import ModelError, RecipeError, first_line
from kfood_dist.model.adapters import require_adapter_fits
from kfood_dist.model.base import REDOWNLOAD, load_config
from kfood_dist.model.files import located
from kfood_dist.model.vision import blank, load_pictures


class QuestionSettings(Protocol):
    """The question to a model: a recipe's `data`, or the settings of an evaluation."""

    @property
    def task(self) -> str: ...
    @property
    def system(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def image_size(self) -> int: ...
    @property
    def max_length(self) -> int: ...


def require_same_pictures(manifest: Manifest, image_size: int, resize: str | None = None) -> None:
    """Raise RecipeError unless the pictures were packed with the size and the resizing that the model needs.

    `image_size` is in pixels. If `resize` is None, any resizing is allowed.
    """
    if manifest.image_size != image_size:
        raise RecipeError(
            f"the pictures in {manifest.where} are {manifest.image_size} pixels wide, not {image_size}",
            f"name shards packed with --image-size {image_size}; without a trained adapter, "
            f"--set data.image_size={manifest.image_size} works too",
        )
    if resize not in (None, manifest.resize):
        raise RecipeError(
            f"the pictures in {manifest.where} were resized by {manifest.resize!r}, but the adapter's by {resize!r}",
            f"name shards packed with --resize {resize}",
        )


def build_template(base: str, settings: QuestionSettings, adapter: Path | None = None) -> Template:
    """Return the template of a base model, and check that it fits the picture size, the length and the adapter.

    Raises ModelError if the model's small files cannot be used, or if the adapter belongs to another model. Raises
    RecipeError if the settings in `settings` do not fit the model.
    """
    pictures = load_pictures(base, load_config(base), settings.image_size)
    template = Template(load_tokenizer(base), pictures, settings.max_length)
    task = build_task(settings.task, settings.system, settings.prompt)
    try:
        template.encode(task.messages(task.example, 1), [pictures.encode(blank(settings.image_size)).ids], None)
    except SampleTooLong:
        raise RecipeError(
            f"data.max_length {settings.max_length} is too short for a picture of {settings.image_size} pixels",
            "raise data.max_length",
        ) from None
    except ReservedToken as reserved:
        raise RecipeError(
            f"data.system or data.prompt holds {reserved.token}, which is a token of the chat template", "remove it"
        ) from None
    if adapter is not None:
        require_adapter_fits(base, adapter)
    return template


def load_tokenizer(base: str) -> Any:
    """Return the tokenizer of `base`, with the chat template that its processor would use. Raises ModelError."""
    from transformers import AutoTokenizer

    where = located(base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ModelError(f"the tokenizer of {base} cannot be read ({first_line(error)})", REDOWNLOAD) from None
    try:
        tokenizer.chat_template = _chat_template(where) or tokenizer.chat_template
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"the chat template of {base} cannot be read ({first_line(error)})", REDOWNLOAD) from None
    return tokenizer


def _chat_template(where: str) -> Any:
    """Return the chat template of the processor, from any file that may hold it. None if only the tokenizer has one.

    Returns several templates as a dictionary, from which the tokenizer takes the one named "default". Returns a single
    template under another name as it is.
    """
    from transformers.processing_utils import ProcessorMixin

    found = ProcessorMixin.get_processor_dict(where)[0].get("chat_template")
    if isinstance(found, dict) and "default" not in found and len(found) == 1:
        return next(iter(found.values()))
    return found
