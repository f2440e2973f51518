"""From prompt and answer to token ids, with tail-preserving truncation.

    system + image + prompt ──► chat template ──► ids, image placeholders expanded ──► + answer, end token
                                                       └──► truncate: the first text tokens go, nothing else

Always holds: the answer is whole; image tokens are whole and keep their number; what is dropped is text, from the
front: first what stands ahead of the image, then the prompt. Training, evaluation and prediction all come through here.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kfood_dist.data.picture.patches import VisionSpec
from kfood_dist.errors import ModelError, RecipeError, first_line

# A data set of dishes has a few hundred answers; one of free text must not fill the memory.
_MOST_REMEMBERED = 4096

_OTHER = "use the chat template and tokenizer that were published with this very model; a text model's do not serve"

IGNORED = -100  # torch.nn.functional.cross_entropy's default ignore_index


class SampleTooLong(Exception):
    """The answer and the image alone exceed the limit; nothing that may be dropped would make it fit."""


@dataclass(frozen=True)
class Encoded:
    """One sample's tokens: `ids`, `labels` (IGNORED outside the answer) and `is_image`, each of shape (length,)."""

    ids: np.ndarray
    labels: np.ndarray
    is_image: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def truncate(droppable: np.ndarray, max_length: int) -> np.ndarray:
    """Mask of the tokens to keep, bool (length,): the first `length - max_length` droppable tokens go.

    Raises SampleTooLong if the tokens that may not be dropped alone exceed `max_length`.
    """
    excess = len(droppable) - max_length
    if excess <= 0:
        return np.ones(len(droppable), dtype=bool)
    if excess > droppable.sum():
        raise SampleTooLong
    return ~(droppable & (np.cumsum(droppable) <= excess))


class Template:
    """Encodes (image grids, answer) for one system text and prompt; picklable, so workers can hold it.

    `tokenizer` is a transformers tokenizer with a chat template. Raises ModelError if it has none, or if the
    template refuses a picture or does not place it; RecipeError if a text holds a special token.
    """

    def __init__(self, tokenizer: Any, vision: VisionSpec, system: str, prompt: str, max_length: int):
        if not tokenizer.chat_template:
            raise ModelError(
                "the base model's tokenizer has no chat template",
                "use an Instruct model, with its chat_template.jinja, chat_template.json or tokenizer_config.json",
            )
        if found := [token for token in tokenizer.all_special_tokens if token in system + prompt]:
            raise RecipeError(
                f"data.system or data.prompt holds {found[0]}, which is a token of the chat template", "leave it out"
            )
        self.tokenizer = tokenizer
        self.vision = vision
        self.system = system
        self.prompt = prompt
        self.max_length = max_length
        self._encoded: dict[tuple[tuple[int, int, int], str | None], Encoded] = {}
        try:
            placed = (self._context == vision.image_token_id).sum()
        except Exception as error:  # a chat template is a program, and may raise anything
            raise ModelError(
                f"the base model's chat template refuses a picture ({type(error).__name__}: {first_line(error)})",
                _OTHER,
            ) from None
        if placed != 1:
            raise ModelError(
                "the base model's chat template does not place exactly one image token for one picture", _OTHER
            )

    @cached_property
    def _context(self) -> np.ndarray:
        """Token ids of everything ahead of the answer, with one placeholder for the image."""
        messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        content = [{"type": "image"}, {"type": "text", "text": self.prompt}]
        messages.append({"role": "user", "content": content})
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self._tokenise(text)

    def encode(self, grid: tuple[int, int, int], answer: str | None) -> Encoded:
        """Tokens of one picture (patch grid time × height × width) and its answer; with None, all but the answer.

        Where the text is cut at all, it is cut by the answer's length more when there is an answer. The same grid and
        answer give the same arrays, which are not to be written to. Raises SampleTooLong.
        """
        if (grid, answer) not in self._encoded:
            if len(self._encoded) >= _MOST_REMEMBERED:
                self._encoded.clear()
            self._encoded[grid, answer] = self._encode(grid, answer)
        return self._encoded[grid, answer]

    def _encode(self, grid: tuple[int, int, int], answer: str | None) -> Encoded:
        num_image_tokens = grid[0] * grid[1] * grid[2] // self.vision.merge_size**2
        repeats = np.where(self._context == self.vision.image_token_id, num_image_tokens, 1)
        context = np.repeat(self._context, repeats)
        tail = self._answer(answer) if answer is not None else np.empty(0, dtype=np.int64)
        ids = np.concatenate([context, tail])
        is_answer = np.arange(len(ids)) >= len(context)
        visual = np.isin(
            ids,
            [self.vision.image_token_id, self.vision.vision_start_token_id, self.vision.vision_end_token_id],
        )
        keep = truncate(~(visual | is_answer), self.max_length)
        return Encoded(
            ids=ids[keep],
            labels=np.where(is_answer, ids, IGNORED)[keep],
            is_image=(ids == self.vision.image_token_id)[keep],
        )

    def decode(self, ids: Any) -> str:
        """The text of generated ids, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _answer(self, answer: str) -> np.ndarray:
        return np.append(self._tokenise(answer), self.tokenizer.eos_token_id)

    def _tokenise(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
