"""Cut the samples of a step into batches of similar lengths, so that little of a batch is padding."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

MOST_PADDING = 0.08  # share of a step's places. More batches would reduce it, but each costs time by itself
_RUN = 1024  # samples that are cut together; the costs of a run are a table of its size squared


def cut_by_length(lengths: Sequence[int], num_tokens: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of each batch of samples with these `lengths`, which are in ascending order.

    A batch has its number of samples × its longest length places, at most `num_tokens`, or a single sample. There are
    as few batches as keep the padding below MOST_PADDING, and of these cuts the one with the least padding is taken.
    """
    for first in range(0, len(lengths), _RUN):
        for start, stop in pairwise(_edges(np.asarray(lengths[first : first + _RUN]), num_tokens)):
            yield first + start, first + stop


def _edges(lengths: np.ndarray, num_tokens: int) -> list[int]:
    """Return the edges of the batches, from 0 to the number of samples: a shortest path over all cuts."""
    count = len(lengths)
    starts, stops = np.arange(count + 1)[:, None], np.arange(1, count + 1)[None]
    sizes = stops - starts
    places = (sizes * lengths[None]).astype(np.float64)  # (start, stop - 1)
    places[(sizes < 1) | ((sizes > 1) & (places > num_tokens))] = np.inf
    least = np.full(count + 1, np.inf)  # the fewest places of the samples before each edge
    least[0] = 0
    origins: list[np.ndarray] = []  # where the last batch before each edge starts, for each number of batches
    while least[count] * (1 - MOST_PADDING) > lengths.sum():
        through = least[:, None] + places
        origins.append(through.argmin(0))
        least = np.concatenate([[np.inf], through.min(0)])
    edges = [count]
    for origin in reversed(origins):
        edges.append(int(origin[edges[-1] - 1]))
    return edges[::-1]
