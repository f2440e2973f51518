"""The photograph: a table, a lit dish seen at an angle, other things on the table, and a camera's faults.

    Board of one helping ──► lit ──► turned, tilted and set on a table ──► light, lens and sensor ──► RGB picture

Every choice comes from one generator, in a fixed order.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from kfood_dist.practice.board import SCALE, SIZE, Board, Colour, clouds
from kfood_dist.practice.dishes import BLACK, GLOSS, PAINTERS, WHITE

TABLES: tuple[Colour, ...] = (
    (164, 118, 78), (124, 84, 56), (206, 176, 138), (84, 62, 50), (222, 218, 210), (188, 186, 182),
    (70, 72, 76), (196, 204, 208), (150, 112, 96), (112, 122, 116), (116, 126, 142), (214, 200, 160),
)  # fmt: skip
SIDES: tuple[Colour, ...] = (
    (170, 60, 36),
    (96, 112, 56),
    (214, 184, 110),
    (228, 222, 206),
    (70, 46, 30),
    (190, 150, 96),
)


def photograph(rng: np.random.Generator, dish: int, width: int, height: int) -> Image.Image:
    """Draw one picture of `dish` (a class id) with `width` × `height` pixels."""
    board = Board(rng)
    PAINTERS[dish](board)
    lamp = float(rng.uniform(0, 2 * np.pi))
    camera = Camera(rng, width, height)
    food = board.lit(lamp - camera.turn, GLOSS[dish] * rng.uniform(0.5, 1.4), rng.uniform(0.7, 1.2))
    table = lay_table(rng, width, height)
    place_things(rng, table, camera)
    picture = np.asarray(serve(rng, table, board, food, camera, lamp), np.float32)
    return expose(rng, picture, lamp)


class Camera:
    """The place of the dish in the picture: its middle and radius in pixels, its turn in radians, and its tilt.

    `squash` is the cosine of the tilt: the height of the tilted circle as a fraction of its width.
    """

    def __init__(self, rng: np.random.Generator, width: int, height: int):
        span = (min(width, height) ** 3 * max(width, height)) ** 0.25
        self.radius = float(span * rng.uniform(0.5, 0.66))
        self.squash = float(np.cos(rng.uniform(0, 0.75)))
        self.turn = float(rng.uniform(0, 2 * np.pi))
        self.middle = (
            width / 2 + float(rng.uniform(-0.06, 0.06)) * width,
            height / 2 + float(rng.uniform(-0.06, 0.06)) * height,
        )

    def inverse(self) -> tuple[float, float, float, float, float, float]:
        """Return Pillow's affine coefficients, which map a pixel of the picture to a pixel of the board."""
        zoom, (cx, cy) = SCALE / self.radius, self.middle
        c, s = float(np.cos(self.turn)), float(np.sin(self.turn))
        a, b, d, e = zoom * c, zoom * s / self.squash, -zoom * s, zoom * c / self.squash
        return (a, b, SIZE / 2 - a * cx - b * cy, d, e, SIZE / 2 - d * cx - e * cy)


def lay_table(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Draw a table top: wood in planks, stone, plain or chequered cloth."""
    base = np.array(TABLES[rng.integers(len(TABLES))], np.float32) + rng.normal(0, 9, 3).astype(np.float32)
    kind = rng.integers(4)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    if kind == 0:
        grain = clouds(rng, height, max(8, width // 14), 12, 3)
        shade = np.asarray(Image.fromarray(grain).resize((width, height), Image.Resampling.BICUBIC)) * 9
        plank = rng.uniform(60, 160)
        shade -= 22 * (np.abs((y + rng.uniform(0, plank)) % plank - plank / 2) < 1.2)
    elif kind == 1:
        shade = clouds(rng, height, width, 5, 4) * 8
    elif kind == 2:
        shade = clouds(rng, height, width, 3, 2) * 3 + 4 * np.sin(x * rng.uniform(0.9, 1.4)) * np.sin(
            y * rng.uniform(0.9, 1.4)
        )
    else:
        check, turn = rng.uniform(30, 90), rng.uniform(0, 1.5)
        u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
        shade = rng.uniform(8, 22) * (np.sign(np.sin(u / check * 6.28)) + np.sign(np.sin(v / check * 6.28)))
    return Image.fromarray(np.clip(base + shade[..., None], 0, 255).astype(np.uint8))


def place_things(rng: np.random.Generator, table: Image.Image, camera: Camera) -> None:
    """Draw up to three things beside the dish, often none: side dishes and cutlery."""
    draw = ImageDraw.Draw(table)
    for _ in range(int(rng.choice([0, 1, 2, 3], p=[0.3, 0.3, 0.25, 0.15]))):
        angle = rng.uniform(0, 2 * np.pi)
        reach = camera.radius * rng.uniform(1.15, 1.6)
        x, y = camera.middle[0] + reach * np.cos(angle), camera.middle[1] + reach * np.sin(angle)
        if rng.random() < 0.6:
            side_dish(rng, draw, x, y, camera)
        else:
            cutlery(rng, draw, x, y, camera)
    table.paste(table.filter(ImageFilter.GaussianBlur(0.8)))


def side_dish(rng: np.random.Generator, draw: ImageDraw.ImageDraw, x: float, y: float, camera: Camera) -> None:
    """Draw a small round plate or cup with a filling."""
    rx = camera.radius * rng.uniform(0.25, 0.5)
    ry = rx * camera.squash
    tone = [int(c) for c in rng.uniform(0.75, 1.0) * np.array(WHITE if rng.random() < 0.7 else (120, 124, 120))]
    filling = [int(c) for c in rng.uniform(0.8, 1.1) * np.array(SIDES[rng.integers(len(SIDES))])]
    draw.ellipse((x - rx, y - ry * 0.85, x + rx, y + ry * 1.2), fill=(60, 52, 46))
    draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=(tone[0], tone[1], tone[2]))
    draw.ellipse(
        (x - rx * 0.75, y - ry * 0.75, x + rx * 0.75, y + ry * 0.75), fill=(filling[0], filling[1], filling[2])
    )


def cutlery(rng: np.random.Generator, draw: ImageDraw.ImageDraw, x: float, y: float, camera: Camera) -> None:
    """Draw two parallel sticks, such as chopsticks."""
    tone = ((190, 192, 196), (120, 80, 50), (60, 44, 40))[rng.integers(3)]
    angle, length = rng.uniform(0, 3.14), camera.radius * rng.uniform(1.2, 2.0)
    dx, dy = np.cos(angle) * length / 2, np.sin(angle) * length / 2
    thick = max(2, int(camera.radius * 0.035))
    gap = thick * 2.2
    for shift in (0.0, gap):
        px, py = -np.sin(angle) * shift, np.cos(angle) * shift
        ends = (x - dx + px, y - dy + py, x + dx + px, y + dy + py)
        draw.line([c + thick * 0.8 for c in ends], fill=(70, 60, 52), width=thick)
        draw.line(ends, fill=tone, width=thick)


def serve(
    rng: np.random.Generator, table: Image.Image, board: Board, food: np.ndarray, camera: Camera, lamp: float
) -> Image.Image:
    """Draw the dish on the table: its shadow, its side wall, then its top."""
    size, inverse = table.size, camera.inverse()
    top = Image.fromarray(np.clip(food, 0, 255).astype(np.uint8))
    top = top.transform(size, Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC)
    outline = board.outline.transform(size, Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
    depth = int(camera.radius * board.depth * rng.uniform(0.7, 1.3) * (1 - camera.squash**2) ** 0.5)
    throw = camera.radius * rng.uniform(0.04, 0.14)
    shadow = outline.filter(ImageFilter.BoxBlur(camera.radius * 0.07)).point(lambda v: int(v * 0.55))
    shift = (round(throw * np.cos(lamp)), round(throw * np.sin(lamp)) + depth)
    table.paste((24, 20, 18), shift, shadow)
    rim = board.colour.getpixel((SIZE // 2, round(SIZE / 2 - SCALE * 0.97)))
    wall = rim if isinstance(rim, tuple) else BLACK
    for down in range(depth, 0, -2):
        share = 0.55 + 0.35 * (1 - down / (depth + 1))
        table.paste(tuple(int(c * share) for c in wall), (0, down), outline)
    table.paste(top, (0, 0), outline)
    return table


def expose(rng: np.random.Generator, picture: np.ndarray, lamp: float) -> Image.Image:
    """Apply the light's fall-off and tint, the exposure, sensor noise and, in some pictures, a soft lens.

    `picture` is (H, W, 3) float32 in 0 to 255.
    """
    height, width = picture.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    fall = 1 - rng.uniform(0, 0.28) * (x * np.cos(lamp) + y * np.sin(lamp)) - rng.uniform(0, 0.18) * (x * x + y * y)
    warmth = rng.normal(0, 0.045)
    tint = np.array([1 + warmth, 1 + rng.normal(0, 0.02), 1 - warmth], np.float32)
    picture = picture * fall[..., None] * tint * rng.uniform(0.82, 1.12)
    contrast = rng.uniform(0.88, 1.12)
    picture = (picture - 118) * contrast + 118
    grain = rng.standard_normal((height, width)).astype(np.float32) * rng.uniform(1, 7)
    image = Image.fromarray(np.clip(picture + grain[..., None], 0, 255).astype(np.uint8))
    blur = rng.uniform(-0.6, 1.1)
    return image.filter(ImageFilter.GaussianBlur(blur)) if blur > 0.2 else image
