"""A shuffle of range(n) that can be read in pieces: places 80,000,000 to 80,000,128 cost no more than the first.

    range(n) ──► rotated, cut into runs of window/64 neighbours ──► runs permuted ──► 64 runs make a window
             ──► each window shuffled in itself

A set no larger than a window is simply shuffled. Of a larger one, a window touches only its own runs: who reads it
reads 64 long stretches of the files instead of single samples from all over. Built from raw Philox words and a stable
sort alone: numpy guarantees the raw stream of a bit generator for good, while `Generator.permutation` may change
between releases (NEP 19), and with it what a resumed run reads.
"""

from functools import cached_property

import numpy as np

# A set of up to a million samples is shuffled whole; sorting that many words takes a tenth of a second.
DEFAULT_WINDOW = 2**20

# So many places of the set meet in a window. The pictures were shuffled when they were packed, so that any run is as
# mixed as the whole; many runs make sure that other samples meet in every epoch.
RUNS_PER_WINDOW = 64

_RUNS, _ROTATION, _WINDOW = range(3)  # what random words are drawn for


class Shuffle:
    """The permutation of `range(size)` that seed and epoch name, in windows of about `window` places."""

    def __init__(self, size: int, window: int, seed: int, epoch: int):
        self.size = size
        self.seed = seed
        self.epoch = epoch
        self.run_length = max(1, window // RUNS_PER_WINDOW)
        self.window = size if size <= window else self.run_length * RUNS_PER_WINDOW
        self._latest: dict[int, np.ndarray] = {}

    def take(self, start: int, stop: int) -> np.ndarray:
        """What stands at the places start … stop - 1, int64."""
        first, last = start // self.window, -(-stop // self.window)
        parts = [self._in_window(number) for number in range(first, last)]
        offset = first * self.window
        return np.concatenate([*parts, np.empty(0, np.int64)])[start - offset : stop - offset]

    def _in_window(self, number: int) -> np.ndarray:
        if number not in self._latest:
            # Places are taken in order: of what was made before, only the window just left may be asked for again.
            self._latest = {n: made for n, made in self._latest.items() if n == number - 1}
            values = self._in_runs(number * self.window, min((number + 1) * self.window, self.size))
            self._latest[number] = values[self._permutation(len(values), _WINDOW, number)]
        return self._latest[number]

    def _in_runs(self, start: int, stop: int) -> np.ndarray:
        """The places start … stop - 1 of the permuted runs. What fills no whole run comes last, and is rotated."""
        run, within = np.divmod(np.arange(start, stop), self.run_length)
        whole = run < len(self._runs)
        run[whole] = self._runs[run[whole]]
        return (run * self.run_length + within + self._rotation) % self.size

    @cached_property
    def _runs(self) -> np.ndarray:
        return self._permutation(self.size // self.run_length, _RUNS)

    @cached_property
    def _rotation(self) -> int:
        return int(self._words(1, _ROTATION)[0] % np.uint64(self.size))

    def _permutation(self, size: int, purpose: int, number: int = 0) -> np.ndarray:
        return np.argsort(self._words(size, purpose, number), kind="stable")

    def _words(self, count: int, purpose: int, number: int = 0) -> np.ndarray:
        """`count` random words of 64 bits, named by the generator's key and the upper words of its counter."""
        key = np.array([self.seed, self.epoch], dtype=np.uint64)
        counter = np.array([0, number, purpose, 0], dtype=np.uint64)
        return np.random.Philox(key=key, counter=counter).random_raw(count)
