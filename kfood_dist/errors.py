"""The project's own family of errors: a user's mistake, said once, with its remedy.

Everything a user can get wrong raises one of these; `cli.main` prints it and exits with status 2, or with 1 where a
run was under way and may do better the next time.
Anything else that escapes is a bug of ours and keeps its traceback.
"""

import os

# Exit statuses. A run that stopped as it was asked to can be started again.
FINISHED, FAILED, MISTAKE, STOPPED, INTERRUPTED = 0, 1, 2, os.EX_TEMPFAIL, 130


class KfoodError(Exception):
    """A fault the user can mend: `what` is wrong, and `remedy` mends it."""

    exit_status = 2

    def __init__(self, what: str, remedy: str):
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what} → {self.remedy}"


class RecipeError(KfoodError):
    """The recipe, a `--set` override, or a DeepSpeed JSON is wrong. All faults are reported together."""


class SourceError(KfoodError):
    """The pictures to pack are missing, empty, or too many of them are unusable."""


class ShardError(KfoodError):
    """A packed data set is missing, of another format version, or damaged."""


class ModelError(KfoodError):
    """The base model or an adapter cannot be found or does not fit."""


class CheckpointError(KfoodError):
    """A checkpoint is incomplete or belongs to another run."""


class TrainingError(KfoodError):
    """Training cannot go on: the loss or a gradient is no longer finite."""


class LaunchError(KfoodError):
    """What was asked for does not fit what this machine or job has."""


def first_line(error: Exception) -> str:
    """The first line of a library's error, at most 200 characters long; its type if it says nothing."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
