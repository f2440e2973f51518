"""What the model is asked about a sample, and how its answer is scored. Each `Task` is a small class.

`table.py` lists all tasks.

columns of a sample ──► messages (pictures in their places) ──► template ──► the model's question
                   ├──► answer ──► what the model learns to write
an answer, columns ─┴──► score ──► 0 wrong … 1 right
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

# In a message's content, this marks the place of the sample's next picture.
PICTURE = None

Columns = Mapping[str, Any]


class Message(NamedTuple):
    """One turn. `role` is system, user or assistant. `content` holds texts, and PICTURE for each picture."""

    role: str
    content: tuple[str | None, ...]


class Task(Protocol):
    """One task. It must be picklable, because loader processes hold it."""

    columns: ClassVar[tuple[str, ...]]  # the columns that a sample must have
    example: ClassVar[Columns]  # the columns of a sample to test the chat template with

    def messages(self, columns: Columns, num_pictures: int) -> tuple[Message, ...]:
        """Return all messages that the model gets before its answer."""

    def answer(self, columns: Columns) -> str:
        """Return the answer that the model learns."""

    def label(self, columns: Columns) -> str:
        """Return the label under which reports count a sample."""

    def clean(self, answer: str) -> str:
        """Return an answer in the form in which answers are compared."""

    def score(self, answer: str, columns: Columns) -> float:
        """Return how far an answer is right, from 0 (wrong) to 1 (right)."""


def build_messages(system: str, text: str, num_pictures: int) -> tuple[Message, ...]:
    """Return the system message, if there is a system text, and one user message: all pictures, then `text`."""
    user = Message("user", (*[PICTURE] * num_pictures, text))
    return (Message("system", (system,)), user) if system else (user,)
