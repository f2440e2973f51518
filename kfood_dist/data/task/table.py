"""Every task by its name in a recipe. To add a task, add one row."""

from collections.abc import Sequence
from pathlib import Path

from kfood_dist.data.task.base import Task
from kfood_dist.data.task.dish import DishClass, DishTask
from kfood_dist.data.task.question import QuestionTask
from kfood_dist.errors import RecipeError

TASKS: dict[str, type[DishTask] | type[QuestionTask]] = {"dish": DishTask, "question": QuestionTask}


def build_task(name: str, system: str, prompt: str, classes: Sequence[DishClass] = ()) -> Task:
    """Return the task of that name with a recipe's texts. `classes` are those of the data set, if it has any."""
    return TASKS[name](system, prompt, classes)


def require_columns(name: str, columns: Sequence[str], where: str, adapter: Path | None = None) -> None:
    """Raise RecipeError unless the samples of a data set have the columns that a task needs.

    `adapter` is the adapter that fixes the task, if any. Then another task needs another adapter.
    """
    missing = [column for column in TASKS[name].columns if column not in columns]
    if not missing:
        return
    fitting = [task for task, made in TASKS.items() if set(made.columns) <= set(columns)]
    remedies = [f"name an adapter of the task {task}" if adapter else f"set data.task={task}" for task in fitting]
    who = f"adapter {adapter} was trained on the task {name}, which" if adapter else f"data.task {name}"
    raise RecipeError(
        f"{who} needs the column {missing[0]}, but the samples in {where} have {', '.join(columns)}",
        " or ".join([*remedies, "use other shards"]),
    )
