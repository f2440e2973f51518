"""The families of models: where the parts of each lie, and how it takes pictures. One row makes a family known.

Module paths are those of transformers 5, from the root of the model's `…ForConditionalGeneration`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kfood_dist.errors import ModelError

LANGUAGE_MODEL, TOWER, CONNECTOR, HEAD = "language_model", "tower", "connector", "head"


@dataclass(frozen=True)
class Family:
    """One family. `pictures` names a way of `vision.py`; `token_types` the input that marks image tokens, if any.

    The connector turns the vision tower's features into the language model's; it may lie inside the tower.
    """

    title: str
    tower: str
    connector: str
    pictures: Literal["patches", "processor"]
    token_types: str = ""
    language_model: str = "model.language_model"
    head: str = "lm_head"
    tower_trains: bool = True  # False: layers behind the features get no gradient, and DDP fails

    @property
    def paths(self) -> dict[str, str]:
        """The module path of each part; of two that lie in each other, the inner one first."""
        return {
            CONNECTOR: self.connector,
            TOWER: self.tower,
            LANGUAGE_MODEL: self.language_model,
            HEAD: self.head,
        }

    def whole_paths(self, parts: Sequence[str]) -> list[str]:
        """The modules that train where these parts do so in full, none inside another; a head goes with its model."""
        found = [self.paths[part] for part in parts] + ([self.head] if LANGUAGE_MODEL in parts else [])
        return [path for path in found if not any(path.startswith(f"{other}.") for other in found)]

    @property
    def connector_is_inside(self) -> bool:
        """Whether the connector lies in the tower."""
        return self.connector.startswith(f"{self.tower}.")

    def sees(self, name: str) -> bool:
        """Whether a module or parameter lies in the tower or the connector, which make features of a picture."""
        return any(f"{name}.".startswith(f"{path}.") for path in (self.tower, self.connector))

    def part_of(self, name: str) -> str | None:
        """The part that a module or parameter belongs to, by its path; None if no part claims it."""
        return next((part for part, path in self.paths.items() if f"{name}.".startswith(f"{path}.")), None)


def _qwen(title: str) -> Family:
    # Without the token types, mRoPE's positions are wrong, silently.
    return Family(title, "model.visual", "model.visual.merger", "patches", token_types="mm_token_type_ids")


FAMILIES = {
    "qwen2_5_vl": _qwen("Qwen2.5-VL"),
    "qwen2_vl": _qwen("Qwen2-VL"),
    "llava": Family("LLaVA-1.5", "model.vision_tower", "model.multi_modal_projector", "processor", tower_trains=False),
}


def family_of(config: Any) -> Family:
    """The family of a model by its transformers config, which is known to be supported (`require_supported`)."""
    return FAMILIES[config.model_type]


def require_supported(base: str, model_type: Any) -> None:
    """Raise ModelError unless the trainer was tested with this `model_type` of a config."""
    if model_type not in list(FAMILIES):
        known = " or ".join(f"{family.title} ({kind})" for kind, family in FAMILIES.items())
        what = f"is a {model_type}, which this trainer was not tested with" if model_type else "names no type of model"
        raise ModelError(f"base model {base} {what}", f"use a {known}")
