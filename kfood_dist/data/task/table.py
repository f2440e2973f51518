"""Every task by its name in a recipe. One row makes a task known."""

from collections.abc import Sequence

from kfood_dist.data.task.base import Task
from kfood_dist.data.task.dish import DishClass, DishTask
from kfood_dist.data.task.question import QuestionTask
from kfood_dist.errors import RecipeError

TASKS: dict[str, type[DishTask] | type[QuestionTask]] = {"dish": DishTask, "question": QuestionTask}


def build_task(name: str, system: str, prompt: str, classes: Sequence[DishClass] = ()) -> Task:
    """The task of that name with a recipe's texts; `classes` are those of the data set, if it has any."""
    return TASKS[name](system, prompt, classes)


def require_columns(name: str, columns: Sequence[str], where: str) -> None:
    """Raise RecipeError unless the samples of a data set have the columns that a task needs."""
    if missing := [column for column in TASKS[name].columns if column not in columns]:
        fitting = [task for task, made in TASKS.items() if set(made.columns) <= set(columns)]
        raise RecipeError(
            f"data.task {name} needs the column {missing[0]}, and the samples in {where} have {', '.join(columns)}",
            " or ".join([*(f"set data.task={task}" for task in fitting), "name other shards"]),
        )
