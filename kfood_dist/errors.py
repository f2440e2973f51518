"""The project's own errors. Each one names a user's mistake, once, and its remedy.

Everything that a user can do wrong raises one of these. `cli.main` prints it and exits with status 2. The status is 1
if a run was under way and may succeed the next time. Any other error that escapes is a bug of ours and keeps its
traceback.
"""

import os

# Exit statuses. STOPPED: the run stopped on request and can be started again.
FINISHED, FAILED, MISTAKE, STOPPED, INTERRUPTED = 0, 1, 2, os.EX_TEMPFAIL, 130


class KfoodError(Exception):
    """A fault that the user can correct: `what` is wrong, and `remedy` says what to do."""

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
    """The pictures to pack are missing or empty, or too many of them are unusable."""


class ShardError(KfoodError):
    """A packed data set is missing, of another format version, or damaged."""


class ModelError(KfoodError):
    """The base model or an adapter cannot be found or does not fit."""


class CheckpointError(KfoodError):
    """A checkpoint is incomplete or belongs to another run."""


class TrainingError(KfoodError):
    """Training cannot continue: the loss or a gradient is no longer finite."""


class LaunchError(KfoodError):
    """The request does not fit what this machine or job has."""


def first_line(error: Exception) -> str:
    """Return the first line of a library's error, at most 200 characters, or its type if it has no message."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
