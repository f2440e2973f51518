"""The pixels of a micro-batch as one array, which its pictures are written to directly."""

import numpy as np


class PixelBlock:
    """The pixels of a micro-batch, one picture after the other. Each picture is written directly to its final place.

    The pictures of a packed set have one size. If one differs, all are joined at the end instead.
    """

    def __init__(self, num_pictures: int):
        self._num_pictures = num_pictures  # a guess: if there are more, all are joined at the end
        self._rows: np.ndarray | None = None  # (pictures, *shape of one), made for the first picture
        self._parts: list[np.ndarray] = []

    def free_row(self, number: int) -> np.ndarray | None:
        """Return the place for the pixels of the next picture (`number` 0) or a later one. None if there is none."""
        place = len(self._parts) + number
        return None if self._rows is None or place >= len(self._rows) else self._rows[place]

    def keep(self, pixels: np.ndarray) -> None:
        """Add a picture's pixels, whether or not they were written to a free row."""
        if self._rows is None and self._num_pictures > 1:
            self._rows = np.empty((self._num_pictures, *pixels.shape), pixels.dtype)
            self._rows[0] = pixels
            pixels = self._rows[0]
        self._parts.append(pixels)

    def joined(self) -> np.ndarray:
        """Return the pixels of all pictures, joined along their first axes."""
        if self._rows is not None and all(part.base is self._rows for part in self._parts):
            return self._rows[: len(self._parts)].reshape(-1, *self._rows.shape[2:])
        return np.concatenate(self._parts)
