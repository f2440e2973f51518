"""Every objective by its name in a recipe. One row adds a loss."""

from typing import Any

from kfood_dist.data.picture.protocol import Pictures
from kfood_dist.model.objective.answer import AnswerLoss, MeanAnswerLoss
from kfood_dist.model.objective.base import Objective

OBJECTIVES: dict[str, type[AnswerLoss]] = {"answer": AnswerLoss, "answer_mean": MeanAnswerLoss}


def build_objective(name: str, model: Any, pictures: Pictures) -> Objective:
    """Return the objective of that name around a PeftModel."""
    return OBJECTIVES[name](model, pictures)
