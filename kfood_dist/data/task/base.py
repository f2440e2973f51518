"""What is asked of a sample, and what of an answer is right: `Task`, one small class for each. `table.py` names all.

columns of a sample ──► messages (pictures in their places) ──► template ──► the model's question
                   ├──► answer ──► what the model learns to write
an answer, columns ─┴──► score ──► 0 wrong … 1 right
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

# In a message's content: the place of the sample's next picture.
PICTURE = None

Columns = Mapping[str, Any]


class Message(NamedTuple):
    """One turn: `role` is system, user or assistant; `content` holds texts, and PICTURE for the next picture."""

    role: str
    content: tuple[str | None, ...]


class Task(Protocol):
    """One task. Picklable, since loader processes hold it."""

    columns: ClassVar[tuple[str, ...]]  # what a sample must have
    example: ClassVar[Columns]  # a sample, to try the template with

    def messages(self, columns: Columns, num_pictures: int) -> tuple[Message, ...]:
        """All that the model is shown before its answer."""

    def answer(self, columns: Columns) -> str:
        """The answer to learn."""

    def label(self, columns: Columns) -> str:
        """What reports count a sample under."""

    def clean(self, answer: str) -> str:
        """An answer in the one form in which answers are compared."""

    def score(self, answer: str, columns: Columns) -> float:
        """How far an answer is right, 0 to 1."""


def asking(system: str, text: str, num_pictures: int) -> tuple[Message, ...]:
    """The system text, if any, and one question after all pictures."""
    user = Message("user", (*[PICTURE] * num_pictures, text))
    return (Message("system", (system,)), user) if system else (user,)
