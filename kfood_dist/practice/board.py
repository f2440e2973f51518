"""The drawing board: a dish seen from straight above, as colours and heights.

    strokes and shapes in dish units ──► a colour image and a height image ──► light on the heights ──► the lit dish

One dish unit is the radius of the vessel, and the origin is the middle of the vessel. Every shape writes its colour and
its height, so one lamp lights the complete picture in the same way. All randomness comes from the board's generator.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[float, float, float]
Point = tuple[float, float]

SIZE = 416  # pixels along each side of the board; the vessel's radius is 0.49 of it
SCALE = 0.49 * SIZE


def clouds(rng: np.random.Generator, height: int, width: int, cells: int, octaves: int = 3) -> np.ndarray:
    """Return smooth random clouds, (height, width) float32: mean 0, amplitude about 1, `cells` lumps across."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        n = max(2, cells * 2**octave)
        coarse = Image.fromarray(rng.standard_normal((n, n)).astype(np.float32))
        total += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) * 0.6**octave
    return total


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """Return the colour that is `share` of the way from `a` to `b`."""
    return (a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share, a[2] + (b[2] - a[2]) * share)


class Board:
    """A square with sides of SIZE pixels, on which a vessel and its food are drawn."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.depth = 0.1  # height of the vessel above the table, in dish units
        self.colour = Image.new("RGB", (SIZE, SIZE), (128, 128, 128))
        self.height = Image.new("L", (SIZE, SIZE), 0)
        self.outline = Image.new("L", (SIZE, SIZE), 0)
        self._paint = ImageDraw.Draw(self.colour)
        self._raise = ImageDraw.Draw(self.height)
        self._trace = ImageDraw.Draw(self.outline)

    def vary(self, colour: Colour, amount: float = 12.0) -> Colour:
        """Return a random similar colour: lighter or darker, with a slightly different tint."""
        shift = self.rng.normal(0, amount) + self.rng.normal(0, amount / 3, 3)
        return (colour[0] + shift[0], colour[1] + shift[1], colour[2] + shift[2])

    def polygon(self, points: Sequence[Point], colour: Colour, height: float, vessel: bool = False) -> None:
        """Fill a polygon. `height` is 0 to 255. `vessel` also adds it to the outline that hides the table."""
        pixels = [(SIZE / 2 + x * SCALE, SIZE / 2 + y * SCALE) for x, y in points]
        self._paint.polygon(pixels, fill=_rgb(colour))
        self._raise.polygon(pixels, fill=_level(height))
        if vessel:
            self._trace.polygon(pixels, fill=255)

    def disc(self, at: Point, radius: float, colour: Colour, height: float, vessel: bool = False) -> None:
        """Fill a circle."""
        x, y, r = SIZE / 2 + at[0] * SCALE, SIZE / 2 + at[1] * SCALE, radius * SCALE
        box = (x - r, y - r, x + r, y + r)
        self._paint.ellipse(box, fill=_rgb(colour))
        self._raise.ellipse(box, fill=_level(height))
        if vessel:
            self._trace.ellipse(box, fill=255)

    def stroke(self, points: Sequence[Point], width: float, colour: Colour, height: float) -> None:
        """Draw a line with round ends through the points."""
        pixels = [(SIZE / 2 + x * SCALE, SIZE / 2 + y * SCALE) for x, y in points]
        thick = max(1, round(width * SCALE))
        self._paint.line(pixels, fill=_rgb(colour), width=thick, joint="curve")
        self._raise.line(pixels, fill=_level(height), width=thick, joint="curve")
        if thick > 3:
            for x, y in (pixels[0], pixels[-1]):
                box = (x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2)
                self._paint.ellipse(box, fill=_rgb(colour))
                self._raise.ellipse(box, fill=_level(height))

    def blob(self, at: Point, size: Point, angle: float, colour: Colour, height: float, rough: float = 0.12) -> None:
        """Fill an uneven ellipse with half-axes `size`, turned by `angle`. `rough` is how uneven its edge is."""
        self.polygon(ring(self.rng, at, size, angle, rough), colour, height)

    def blend(self, mask: np.ndarray, colour: Colour) -> None:
        """Blend a colour over the board with a mask of 0 to 1, (SIZE, SIZE)."""
        opacity = Image.fromarray((np.clip(mask, 0, 1) * 255).astype(np.uint8))
        self.colour.paste(_rgb(colour), (0, 0), opacity)

    def inside(self, radius: float) -> np.ndarray:
        """Return a mask, (SIZE, SIZE) float32: 1 within `radius` of the middle, 0 outside."""
        axis = (np.arange(SIZE, dtype=np.float32) - SIZE / 2) / SCALE
        return (axis[None, :] ** 2 + axis[:, None] ** 2 < radius**2).astype(np.float32)

    def scatter(self, count: int, radius: float) -> list[Point]:
        """Return random points, uniformly distributed over a disc."""
        angle = self.rng.uniform(0, 2 * np.pi, count)
        reach = radius * np.sqrt(self.rng.uniform(0, 1, count))
        return [(float(r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(reach, angle, strict=True)]

    def spread(self, count: int, radius: float) -> list[Point]:
        """Return points over a disc that keep a distance: on a sunflower spiral, each moved a little at random."""
        order = np.arange(count) + 0.5
        angle = order * 2.39996 + self.rng.uniform(0, 2 * np.pi)
        reach = radius * np.sqrt(order / count)
        step = 0.35 * radius / count**0.5
        x, y = reach * np.cos(angle), reach * np.sin(angle)
        moved = self.rng.normal(0, step, (2, count))
        points = np.stack([x + moved[0], y + moved[1]], 1)
        return [(float(x), float(y)) for x, y in points[self.rng.permutation(count)]]

    def lit(self, lamp: float, gloss: float, relief: float = 1.0) -> np.ndarray:
        """Return the colours under a lamp in the direction `lamp` (radians), (SIZE, SIZE, 3) float32, about 0 to 255.

        Slopes towards the lamp become brighter, and shine by `gloss`. Hollows become darker. `relief` scales the effect
        of the heights.
        """
        near = np.asarray(self.height.filter(ImageFilter.GaussianBlur(1.6)), np.float32)
        wide = np.asarray(self.height.filter(ImageFilter.BoxBlur(9)), np.float32)
        grain = clouds(self.rng, SIZE, SIZE, 40, 2)
        dy, dx = np.gradient(near + grain * 1.2)
        slope = (dx * np.cos(lamp) + dy * np.sin(lamp)) * 0.035 * relief
        shade = 1 - 0.75 * np.tanh(slope) + np.clip((near - wide) * 0.004 * relief, -0.3, 0.12) + grain * 0.012
        shine = gloss * 120 * np.clip(-slope - 0.12, 0, 0.6) ** 2
        return np.asarray(self.colour, np.float32) * shade[..., None] + shine[..., None] * 4


def ring(
    rng: np.random.Generator, at: Point, size: Point, angle: float, rough: float = 0.0, corners: int = 26
) -> list[Point]:
    """Return the edge of an ellipse around `at` with half-axes `size`, turned by `angle`, made uneven by `rough`."""
    turn = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    reach = np.ones(corners)
    for wave in (2, 3, 5):
        reach += rough / wave**0.5 * rng.normal() * np.cos(wave * turn + rng.uniform(0, 6.3))
    x, y = size[0] * reach * np.cos(turn), size[1] * reach * np.sin(turn)
    c, s = np.cos(angle), np.sin(angle)
    return list(zip((at[0] + c * x - s * y).tolist(), (at[1] + s * x + c * y).tolist(), strict=True))


def box(at: Point, size: Point, angle: float) -> list[Point]:
    """Return the points of a rectangle around `at` with half-sides `size`, turned by `angle`, with its corners cut."""
    w, h = size
    cut = 0.25 * min(w, h)
    corners = [
        (w - cut, -h), (w, -h + cut), (w, h - cut), (w - cut, h),
        (cut - w, h), (-w, h - cut), (-w, cut - h), (cut - w, -h),
    ]  # fmt: skip
    c, s = float(np.cos(angle)), float(np.sin(angle))
    return [(at[0] + c * x - s * y, at[1] + s * x + c * y) for x, y in corners]


def wave(start: Point, angle: float, length: float, bend: float, phase: float, steps: int = 10) -> list[Point]:
    """Return a wavy line with its middle at `start`, in the direction `angle`: a noodle, a ribbon, a leaf's rib."""
    along = np.linspace(-0.5, 0.5, steps) * length
    across = bend * np.sin(along / max(length, 1e-6) * 6.0 + phase)
    c, s = np.cos(angle), np.sin(angle)
    x, y = start[0] + c * along - s * across, start[1] + s * along + c * across
    return list(zip(x.tolist(), y.tolist(), strict=True))


def _rgb(colour: Colour) -> tuple[int, int, int]:
    r, g, b = (min(255, max(0, int(c))) for c in colour)
    return (r, g, b)


def _level(height: float) -> int:
    return min(255, max(0, int(height)))
