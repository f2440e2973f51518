"""The families of models: where the parts of each are, and how it takes pictures. One row adds a family.

Module paths are those of transformers 5, from the root of the model's `…ForConditionalGeneration`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kfood_dist.errors import ModelError

LANGUAGE_MODEL, TOWER, CONNECTOR, HEAD = "language_model", "tower", "connector", "head"


@dataclass(frozen=True)
class Family:
    """One family. `pictures` selects a loader of `vision.py`.

    `token_types` is the model input that marks image tokens, or empty. The connector turns the features of the vision
    tower into those of the language model. It may be inside the tower.
    """

    title: str
    tower: str
    connector: str
    pictures: Literal["patches", "processor"]
    token_types: str = ""
    language_model: str = "model.language_model"
    head: str = "lm_head"
    tower_trains: bool = True  # False: the features come from an earlier layer, so its last ones get no gradient
    packs_pictures: bool = False  # True: the tower takes all pictures of a batch as one sequence

    @property
    def paths(self) -> dict[str, str]:
        """The module path of each part. If one part is inside another, the inner one comes first."""
        return {
            CONNECTOR: self.connector,
            TOWER: self.tower,
            LANGUAGE_MODEL: self.language_model,
            HEAD: self.head,
        }

    def paths_in_full(self, parts: Sequence[str]) -> list[str]:
        """Return the modules to train in full for these parts, none inside another. The head trains with its model."""
        found = [self.paths[part] for part in parts] + ([self.head] if LANGUAGE_MODEL in parts else [])
        return [path for path in found if not any(path.startswith(f"{other}.") for other in found)]

    @property
    def connector_is_inside(self) -> bool:
        """Whether the connector is inside the tower."""
        return self.connector.startswith(f"{self.tower}.")

    def is_visual(self, name: str) -> bool:
        """Return whether a module or parameter is in the tower or the connector, which make features of a picture."""
        return any(f"{name}.".startswith(f"{path}.") for path in (self.tower, self.connector))

    def part_of(self, name: str) -> str | None:
        """Return the part that a module or parameter belongs to by its path, or None if it belongs to no part."""
        return next((part for part, path in self.paths.items() if f"{name}.".startswith(f"{path}.")), None)


def _qwen(title: str) -> Family:
    return Family(
        title,
        tower="model.visual",
        connector="model.visual.merger",
        pictures="patches",
        token_types="mm_token_type_ids",  # without them, the positions of mRoPE are wrong, without a warning
        packs_pictures=True,
    )


FAMILIES = {
    "qwen2_5_vl": _qwen("Qwen2.5-VL"),
    "qwen2_vl": _qwen("Qwen2-VL"),
    "llava": Family("LLaVA-1.5", "model.vision_tower", "model.multi_modal_projector", "processor", tower_trains=False),
}


def family_of(config: Any) -> Family:
    """Return the family of a model by its transformers config, which `require_supported` has accepted."""
    return FAMILIES[config.model_type]


def require_supported(base: str, model_type: Any) -> None:
    """Raise ModelError unless the trainer was tested with this `model_type` of a config."""
    if model_type not in list(FAMILIES):
        known = " or ".join(f"{family.title} ({kind})" for kind, family in FAMILIES.items())
        what = f"is a {model_type}, which this trainer was not tested with" if model_type else "names no model type"
        raise ModelError(f"base model {base} {what}", f"use a {known}")
