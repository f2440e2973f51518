"""The settings with which a model is asked, resolved before torch is needed.

    adapter's kfood.json, else --config RECIPE, else the recipe's defaults ──► Settings

Always holds: prompt, picture size and length are those that the adapter was trained with. Settings that only say how
to compute (quantisation, precision, attention) may be overridden by name with `--set model.…`.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kfood_dist.config import recipe as config
from kfood_dist.config.sections import Data, Eval, Model, Recipe
from kfood_dist.data.picture.images import RESIZE_POLICIES
from kfood_dist.errors import ModelError, RecipeError

DATA_KEYS = ("task", "system", "prompt", "image_size", "max_length")
MODEL_KEYS = ("quantization", "precision", "attention")


@dataclass(frozen=True)
class Settings:
    """How the model sees a picture and is asked about it. `resize` is None if nothing defines it."""

    task: str
    system: str
    prompt: str
    image_size: int
    max_length: int
    resize: str | None
    quantization: str
    precision: str
    attention: str


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that name a model and its settings."""
    parser.add_argument("--model", required=True, metavar="BASE", help="folder or hub name of the base model")
    parser.add_argument(
        "--adapter",
        type=Path,
        metavar="DIR",
        help="trained adapter, such as runs/NAME/adapter; its prompt and picture size are used",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="RECIPE",
        help="recipe whose prompt, picture size and precision are used if the adapter does not set them "
        "(default: the recipe's defaults)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one recipe setting, such as model.quantization=none; may be repeated",
    )


def resolve_settings(args: argparse.Namespace) -> tuple[Settings, Eval]:
    """Return the settings that `args` ask for, and the recipe's `eval` section.

    Raises RecipeError for a wrong recipe, or for a `--set` that contradicts how the adapter was trained. Raises
    ModelError if the folder has no adapter, or if the facts beside it are damaged.
    """
    recipe = config.load_recipe(args.config, args.set) if args.config else _default_recipe(args.set)
    facts = _adapter_facts(args.adapter) if args.adapter else {}
    chosen = {text.partition("=")[0].strip() for text in args.set}
    _require_no_contradiction(recipe, facts, chosen, args.adapter)
    kept = {key: facts[key] for key in MODEL_KEYS if key in facts and f"model.{key}" not in chosen}
    try:
        data = Data.model_validate(recipe.data.model_dump() | {k: facts[k] for k in DATA_KEYS if k in facts})
        model = Model.model_validate(recipe.model.model_dump() | kept)
    except ValidationError as error:
        fault = error.errors()[0]
        if not fault["loc"]:  # the adapter's setting conflicts with another setting
            message = fault["msg"].removeprefix("Value error, ")
            raise RecipeError(f"with the settings of adapter {args.adapter}, {message}", "correct --set") from None
        raise ModelError(
            f"{args.adapter}/kfood.json: {'.'.join(map(str, fault['loc']))}: {fault['msg']}", _COPY_ADAPTER
        ) from None
    resize = facts.get("resize")
    if resize not in (None, *RESIZE_POLICIES):
        raise ModelError(f"{args.adapter}/kfood.json: resize {resize!r} is unknown", _COPY_ADAPTER)
    values = {key: getattr(data, key) for key in DATA_KEYS} | {key: getattr(model, key) for key in MODEL_KEYS}
    return Settings(**values, resize=resize), recipe.eval


def _default_recipe(overrides: list[str]) -> Recipe:
    # The three keys without a default do not affect how a model is asked.
    tree: dict[str, Any] = {"data": {"shards": "."}, "model": {"base": "."}, "run": {"dir": "."}}
    return config.build_recipe(tree, overrides, "--set")


def _adapter_facts(folder: Path) -> dict[str, Any]:
    from kfood_dist.model.adapters import read_adapter_facts  # imports torch's libraries

    return read_adapter_facts(folder)


_COPY_ADAPTER = "copy the complete adapter folder from its run again"


def _require_no_contradiction(recipe: Recipe, facts: dict[str, Any], chosen: set[str], adapter: Path | None) -> None:
    for key in DATA_KEYS:
        value = getattr(recipe.data, key)
        if f"data.{key}" in chosen and facts.get(key, value) != value:
            raise RecipeError(
                f"--set data.{key}={value} contradicts adapter {adapter}, which was trained with {facts[key]!r}",
                "remove that --set",
            )
