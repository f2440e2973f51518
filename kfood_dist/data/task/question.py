"""Questions with free answers: each sample brings its own question and answer."""

from collections.abc import Sequence
from typing import ClassVar

from kfood_dist.data.task.base import Columns, Message, asking
from kfood_dist.data.task.dish import DishClass, clean


class QuestionTask:
    """`{question}` in the prompt is the sample's. An answer is right if it is the sample's own in its clean form."""

    columns: ClassVar[tuple[str, ...]] = ("question", "answer")
    example: ClassVar[Columns] = {"question": "무엇이 보이나요?", "answer": "밥"}

    def __init__(self, system: str, prompt: str, classes: Sequence[DishClass] = ()):
        self._system = system
        self._prompt = prompt

    def messages(self, columns: Columns, num_pictures: int) -> tuple[Message, ...]:
        # Not str.format, to which braces in the prompt would be fields too.
        return asking(self._system, self._prompt.replace("{question}", columns["question"]), num_pictures)

    def answer(self, columns: Columns) -> str:
        return columns["answer"]

    def label(self, columns: Columns) -> str:
        return columns["answer"]

    def clean(self, answer: str) -> str:
        return clean(answer)

    def score(self, answer: str, columns: Columns) -> float:
        return float(clean(answer) == clean(columns["answer"]))
