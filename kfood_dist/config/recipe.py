"""A recipe, read from its YAML file and checked before anything is loaded.

    recipe.yaml + `--set a.b=c` ──► load_recipe ──► Recipe (frozen, complete) ──► saved in the run directory

A file may begin with `extends: OTHER.yaml` and then hold only what differs from that file. Unknown keys are refused.
All faults are reported together, each with its fix. `sections.py` defines what a recipe may contain.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from kfood_dist.config import yaml_text as recipe_yaml
from kfood_dist.config.sections import Data, Recipe, Section, kinds_of
from kfood_dist.errors import RecipeError
from kfood_dist.system.files import write_atomically

_Section = TypeVar("_Section", bound=Section)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply `section.key=value` overrides in order, and check the result.

    A text key takes everything after `=` and needs no quotes (`run.dir=runs/try #2`). `null` unsets a key that may have
    no value. Other values are YAML (`train.max_steps=20`). Raises a RecipeError that names every fault.
    """
    return build_recipe(_read_yaml(path), overrides, f"recipe {path}")


def build_recipe(tree: dict[str, Any], overrides: Sequence[str], title: str) -> Recipe:
    """Build a recipe from sections of keys and `section.key=value` overrides. A RecipeError begins with `title`."""
    faults = [fault for text in overrides if (fault := _apply_override(tree, text))]
    return _checked(Recipe, tree, faults, title, "correct this in the file or in --set")


def build_data(tree: dict[str, Any], title: str) -> Data:
    """Build only the `data` section, for commands that need no other. Raises a RecipeError that names every fault."""
    return _checked(Data, tree, [], title, "correct this")


def _checked(model: type[_Section], tree: dict[str, Any], faults: list[str], title: str, remedy: str) -> _Section:
    try:
        made = model.model_validate(tree)
    except ValidationError as error:
        faults = faults + [_describe(e, model) for e in error.errors()]
    if faults:
        raise RecipeError(_join(title, faults), remedy)
    return made


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, with every default, as YAML that `load_recipe` reads back.

    Raises CheckpointError if it cannot be written. An earlier file then stays complete.
    """
    write_atomically(path, recipe_yaml.write_tree(recipe.model_dump(mode="json")))


def _read_yaml(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the sections of a recipe file, merged over those that it extends. `below` are the files that extend it."""
    try:
        tree = recipe_yaml.read_file_text(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"recipe {path} cannot be read ({error.strerror})",
            "name one of launch/recipes/*.yaml or your own",
        ) from None
    except recipe_yaml.UnclearText as error:
        raise RecipeError(
            f"recipe {path}, {error}", "put quotes around all of the text, or a space after the # of a comment"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or too many digits
        first_line = " ".join(str(error).split())
        raise RecipeError(
            f"recipe {path} is not YAML ({first_line})", "correct that line; quote a text with `: ` or special signs"
        ) from None
    extended = tree.pop("extends", None) if isinstance(tree, dict) else None
    if not isinstance(tree, dict) or not all(isinstance(v, dict) for v in tree.values()):
        raise RecipeError(
            f"recipe {path} does not hold sections",
            f"write it as `section:` with indented `key: value` lines; sections: {', '.join(Recipe.model_fields)}",
        )
    if extended is None:
        return tree
    if not isinstance(extended, str) or path.resolve() in below:
        fault = "extends itself" if isinstance(extended, str) else f"has `extends: {extended}`"
        raise RecipeError(f"recipe {path} {fault}", "name one other recipe file after `extends:`, relative to this one")
    lower = _read_yaml(path.parent / extended, (*below, path.resolve()))
    return _laid_over(lower, tree)


def _laid_over(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """Return `lower` with the keys of `upper` replacing its own. A section in both is merged key by key."""
    return lower | {
        key: _laid_over(lower[key], value) if isinstance(value, dict) and isinstance(lower.get(key), dict) else value
        for key, value in upper.items()
    }


def _apply_override(tree: dict[str, Any], text: str) -> str | None:
    """Put one `section.key=value` into the tree. Returns a description of the fault if the text is wrong, else None."""
    name, equals, value = text.partition("=")
    keys = name.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        return f"--set {text}: write it as section.key=value, for example train.max_steps=20"
    value = value.strip() if name.endswith(" ") else value  # written as `key = value`
    kinds = _kinds_of(keys)
    if not value.strip() and kinds and str not in kinds:
        remedy = "write null for none" if type(None) in kinds else "write one after ="
        return f"--set {text}: there is no value; {remedy}"
    try:
        parsed = _typed(value, kinds)
    except recipe_yaml.UnclearText as error:
        return f"--set {text}: {error}; leave it out, or put quotes around the text that contains it"
    except (yaml.YAMLError, ValueError, RecursionError):
        return f"--set {text}: the value is not YAML; put quotes around each text in it"
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            return f"--set {text}: {key} is {tree!r}, which has no keys; set all of {key} at once"
    tree[keys[-1]] = parsed
    return None


def _kinds_of(keys: Sequence[str]) -> set[Any]:
    """Return the types that a recipe's key, such as `section.key`, allows; an empty set for an unknown key."""
    kind: Any = Recipe
    for key in keys:
        fields = getattr(kind, "model_fields", {})
        if key not in fields:
            return set()
        kind = fields[key].annotation
    return kinds_of(kind)


def _typed(value: str, kinds: set[Any]) -> Any:
    """Return what `value` means for a key of these types. Raises yaml.YAMLError, ValueError or RecursionError."""
    if not {str, Path} & kinds:
        return recipe_yaml.read_value(value)
    if value == "null" and type(None) in kinds:
        return None
    return recipe_yaml.read_text(value)


def _describe(error: Any, model: type[Section]) -> str:
    """Describe one pydantic fault in our words: where, what, and the nearest right key for a wrong one."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _known_keys(model, error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        return f"{where}: no such key; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}")
    if error["type"] == "missing":
        return f"{where}: missing; add it"
    if error["type"] == "value_error":
        return (f"{where}: " if where else "") + error["msg"].removeprefix("Value error, ")
    if error["type"] in ("string_type", "path_type"):
        return (
            f"{where}: a text is needed, but YAML reads {_describe_value(error['input'])}; put quotes around all of it"
        )
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}, not {error['input']!r}"


def _describe_value(value: Any) -> str:
    """Describe in words what YAML made of an unquoted text."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    kinds = {int: "the number", float: "the number", dict: "a section", list: "a list"}
    return f"{kinds.get(type(value), 'a value')} {value!r}"


def _known_keys(model: type[Section], location: tuple[Any, ...]) -> list[str]:
    """Return the keys of the section at `location`. A number in it is a position in a list of sections."""
    kind: Any = model
    for part in location:
        kind = get_args(kind)[0] if isinstance(part, int) else kind.model_fields[part].annotation
    return list(kind.model_fields)


def _join(title: str, faults: list[str]) -> str:
    if len(faults) == 1:
        return f"{title}: {faults[0]}"
    return f"{title} has {len(faults)} faults:\n" + "\n".join(f"  - {fault}" for fault in faults) + "\n"
