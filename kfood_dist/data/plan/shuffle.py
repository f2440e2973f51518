"""A shuffle of range(n) that can be read in pieces: places 80,000,000 to 80,000,128 cost no more than places 0 to 128.

    range(n) ──► rotated, cut into runs of window/64 neighbours ──► runs permuted ──► 64 runs make a window
             ──► each window shuffled

A set no larger than a window is simply shuffled. In a larger set, a window touches only its own runs: a reader reads
64 long stretches of the files instead of single samples from everywhere. The shuffle uses only raw Philox words and a
stable sort. numpy guarantees that the raw stream of a bit generator never changes, but `Generator.permutation` may
change between releases (NEP 19), and then a resumed run would read other samples.
"""

from functools import cached_property

import numpy as np

# A set of up to a million samples is shuffled as one window. Sorting that many words takes a tenth of a second.
DEFAULT_WINDOW = 2**20

# Number of runs from all over the set that meet in a window. Packing has shuffled the pictures, so any run is as mixed
# as the complete set. Many runs make sure that different samples meet in every epoch.
RUNS_PER_WINDOW = 64

_RUNS, _ROTATION, _WINDOW = range(3)  # the purposes of random words


class Shuffle:
    """The permutation of `range(size)` for a seed and an epoch, in windows of about `window` places."""

    def __init__(self, size: int, window: int, seed: int, epoch: int):
        self.size = size
        self.seed = seed
        self.epoch = epoch
        self.run_length = max(1, window // RUNS_PER_WINDOW)
        self.window = size if size <= window else self.run_length * RUNS_PER_WINDOW
        self._latest: dict[int, np.ndarray] = {}

    def take(self, start: int, stop: int) -> np.ndarray:
        """Return the values at the places `start` to `stop` - 1, int64."""
        first, last = start // self.window, -(-stop // self.window)
        parts = [self._in_window(number) for number in range(first, last)]
        offset = first * self.window
        return np.concatenate([*parts, np.empty(0, np.int64)])[start - offset : stop - offset]

    def _in_window(self, number: int) -> np.ndarray:
        if number not in self._latest:
            # Places are taken in order, so of the windows made before, only the previous one may be needed again.
            self._latest = {n: made for n, made in self._latest.items() if n == number - 1}
            values = self._in_runs(number * self.window, min((number + 1) * self.window, self.size))
            self._latest[number] = values[self._permutation(len(values), _WINDOW, number)]
        return self._latest[number]

    def _in_runs(self, start: int, stop: int) -> np.ndarray:
        """Return the values at the places `start` to `stop` - 1 of the permuted runs.

        The places that do not fill a run come last. All values are rotated, so these are other samples in each epoch.
        """
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
        """Return `count` random words of 64 bits, chosen by the generator's key and the upper words of its counter."""
        key = np.array([self.seed, self.epoch], dtype=np.uint64)
        counter = np.array([0, number, purpose, 0], dtype=np.uint64)
        return np.random.Philox(key=key, counter=counter).random_raw(count)
