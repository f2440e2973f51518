"""Questions with free answers: each sample has its own question and answer."""

from collections.abc import Sequence
from typing import ClassVar

from kfood_dist.data.task.base import Columns, Message, build_messages
from kfood_dist.data.task.dish import DishClass, clean


class QuestionTask:
    """The task with one question per sample, which replaces `{question}` in the prompt.

    An answer is right if its clean form is the clean form of the sample's answer.
    """

    columns: ClassVar[tuple[str, ...]] = ("question", "answer")
    example: ClassVar[Columns] = {"question": "무엇이 보이나요?", "answer": "밥"}

    def __init__(self, system: str, prompt: str, classes: Sequence[DishClass] = ()):
        self._system = system
        self._prompt = prompt

    def messages(self, columns: Columns, num_pictures: int) -> tuple[Message, ...]:
        # str.format is not used, because it would take other braces in the prompt as fields too.
        return build_messages(self._system, self._prompt.replace("{question}", columns["question"]), num_pictures)

    def answer(self, columns: Columns) -> str:
        return columns["answer"]

    def label(self, columns: Columns) -> str:
        return columns["answer"]

    def clean(self, answer: str) -> str:
        return clean(answer)

    def score(self, answer: str, columns: Columns) -> float:
        return float(clean(answer) == clean(columns["answer"]))
