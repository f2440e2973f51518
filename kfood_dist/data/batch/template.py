"""Turn messages and an answer into token ids, with truncation that preserves the tail.

    messages ──► chat template ──► ids, each placeholder its picture's tokens ──► + answer, end token
                                          └──► truncate: drops the first text tokens, nothing else

Always holds: the answer is complete, and so are the image tokens. Only text is dropped, from the front: first the text
before the image, then the prompt. Training, evaluation and prediction all use this module.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kfood_dist.data.picture.protocol import Pictures
from kfood_dist.data.task.base import Message
from kfood_dist.errors import ModelError, first_line

# A data set of dishes has a few hundred answers. A data set of free text must not fill the memory.
_CACHE_SIZE = 4096

_OTHER = "use the chat template and tokenizer that were published with this model; those of a text model do not work"

IGNORED = -100  # torch.nn.functional.cross_entropy's default ignore_index


class SampleRefused(Exception):
    """A sample that cannot be encoded. The text of the exception says why."""


class SampleTooLong(SampleRefused):
    """A sample whose answer and pictures exceed the limit, even if all text that may be dropped is dropped."""

    def __init__(self) -> None:
        super().__init__("answer and image alone exceed data.max_length")


class ReservedToken(SampleRefused):
    """A sample whose text contains `token`, which has a meaning of its own in the chat template."""

    def __init__(self, token: str):
        super().__init__(f"its text holds {token}, which is a token of the chat template")
        self.token = token


@dataclass(frozen=True)
class Encoded:
    """One sample's tokens: `ids`, `labels` (IGNORED outside the answer) and `is_image`, each of shape (length,)."""

    ids: np.ndarray
    labels: np.ndarray
    is_image: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def truncate(droppable: np.ndarray, max_length: int) -> np.ndarray:
    """Return the mask of the tokens to keep, bool (length,). Drops the first `length - max_length` droppable tokens.

    Raises SampleTooLong if there are more than `max_length` tokens that must not be dropped.
    """
    excess = len(droppable) - max_length
    if excess <= 0:
        return np.ones(len(droppable), dtype=bool)
    if excess > droppable.sum():
        raise SampleTooLong
    return ~(droppable & (np.cumsum(droppable) <= excess))


class Template:
    """The encoder of (messages, pictures, answer) for one model. Picklable, so that workers can hold it.

    `tokenizer` is a transformers tokenizer with a chat template. Raises ModelError if it has no chat template.
    """

    def __init__(self, tokenizer: Any, pictures: Pictures, max_length: int):
        if not tokenizer.chat_template:
            raise ModelError(
                "the base model's tokenizer has no chat template",
                "use an Instruct model, with its chat_template.jinja, chat_template.json or tokenizer_config.json",
            )
        self.tokenizer = tokenizer
        self.pictures = pictures
        self.max_length = max_length
        self._contexts: dict[tuple[Message, ...], np.ndarray] = {}
        self._encoded: dict[tuple[tuple[Message, ...], tuple[bytes, ...], str | None], Encoded] = {}

    def encode(self, messages: tuple[Message, ...], pictures: Sequence[np.ndarray], answer: str | None) -> Encoded:
        """Return the tokens of the messages and the answer. If `answer` is None, returns all tokens but the answer's.

        `pictures` has the ids that stand for each picture of the messages. If text must be dropped, an answer makes it
        shorter by the answer's length. The same input gives the same arrays: do not write to them. Raises
        SampleRefused if the sample cannot be encoded. Raises ModelError if the chat template refuses the messages, or
        does not place their pictures.
        """
        words = messages, tuple(ids.tobytes() for ids in pictures), answer
        return _cached(self._encoded, words, lambda: self._encode(messages, pictures, answer))

    def _encode(self, messages: tuple[Message, ...], pictures: Sequence[np.ndarray], answer: str | None) -> Encoded:
        context = _cached(self._contexts, messages, lambda: self._context(messages))
        places = np.flatnonzero(context == self.pictures.placeholder)
        if len(places) != len(pictures):
            raise ModelError(
                "the base model's chat template does not place exactly one image token for one picture", _OTHER
            )
        pieces = np.split(context, np.sort(np.concatenate([places, places + 1])))  # texts and placeholders alternate
        for number, ids in enumerate(pictures):
            pieces[2 * number + 1] = ids
        is_picture = np.repeat(np.arange(len(pieces)) % 2 == 1, [len(piece) for piece in pieces])
        tail = self._answer(answer) if answer is not None else np.empty(0, dtype=np.int64)
        ids = np.concatenate([*pieces, tail])
        is_answer = np.arange(len(ids)) >= len(is_picture)
        visual = np.isin(ids, list(self.pictures.kept)) | np.pad(is_picture, (0, len(tail)))
        keep = truncate(~(visual | is_answer), self.max_length)
        return Encoded(
            ids=ids[keep],
            labels=np.where(is_answer, ids, IGNORED)[keep],
            is_image=(ids == self.pictures.image_token)[keep],
        )

    def _context(self, messages: tuple[Message, ...]) -> np.ndarray:
        """Return the token ids of everything before the answer, with one placeholder for each picture."""
        texts = [text for message in messages for text in message.content if text is not None]
        for text in texts:
            self._require_plain(text)
        turns = [
            {
                "role": message.role,
                "content": [{"type": "image"} if text is None else {"type": "text", "text": text} for text in content],
            }
            for message in messages
            if (content := message.content)
        ]
        try:
            written = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a chat template is a program, and may raise any exception
            raise ModelError(
                f"the base model's chat template refuses a picture ({type(error).__name__}: {first_line(error)})",
                _OTHER,
            ) from None
        if lost := [text for text in texts if text.strip() not in written]:
            raise ModelError(
                f"the base model's chat template drops the text {lost[0][:60]!r}",
                'use a template that writes it; if it is the system text, omit it with --set data.system=""',
            )
        # Like transformers: if the template writes the beginning-of-text token itself, no second one is added.
        begins = self.tokenizer.bos_token is not None and written.startswith(self.tokenizer.bos_token)
        return self._tokenise(written, special=not begins)

    def decode(self, ids: Any) -> str:
        """Return the text of generated ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _answer(self, answer: str) -> np.ndarray:
        self._require_plain(answer)
        return np.append(self._tokenise(answer), self.tokenizer.eos_token_id)

    def _require_plain(self, text: str) -> None:
        """Raise SampleRefused if a part of the text would be read as a special token, such as a picture's."""
        for token in self.tokenizer.all_special_tokens:
            if token in text:
                raise ReservedToken(token)

    def _tokenise(self, text: str, special: bool = False) -> np.ndarray:
        return np.array(self.tokenizer(text, add_special_tokens=special)["input_ids"], dtype=np.int64)


def _cached(known: dict[Any, Any], words: Any, make: Any) -> Any:
    if words not in known:
        if len(known) >= _CACHE_SIZE:
            known.clear()
        known[words] = make()
    return known[words]
