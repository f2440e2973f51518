"""The look of each of the ten practice dishes: its vessel, its colours, and its pieces and their positions.

Each painter takes a Board and draws one helping. The features of the dish are fixed here. The number of pieces, their
shades and their positions come from the board's generator, so no two helpings are the same.
"""

from collections.abc import Callable

import numpy as np

from kfood_dist.practice.board import Board, Colour, Point, box, clouds, mix, ring, wave

WHITE, BLACK, STEEL = (238, 236, 230), (44, 40, 38), (186, 190, 194)
CELADON, BLUE, CREAM = (176, 196, 178), (120, 146, 178), (228, 214, 188)
SCALLION, CHILLI, EGG = (104, 158, 66), (190, 40, 26), (240, 196, 70)


def plate(board: Board, colours: tuple[Colour, ...], inner: float = 0.74) -> None:
    """Draw a flat round plate: a broad rim and a shallow well of radius `inner`."""
    colour = board.vary(colours[board.rng.integers(len(colours))], 6)
    board.disc((0, 0), 1.0, colour, 90, vessel=True)
    if board.rng.random() < 0.4:
        band = board.vary(BLUE if board.rng.random() < 0.6 else (150, 96, 70), 20)
        board.disc((0, 0), 0.95, band, 86)
        board.disc((0, 0), 0.92, colour, 82)
    board.disc((0, 0), inner, mix(colour, BLACK, 0.05), 60)


def bowl(board: Board, colours: tuple[Colour, ...], broth: Colour, inner: float = 0.86) -> None:
    """Draw a deep bowl with a thin rim, filled to radius `inner` with a broth whose colour varies a little."""
    colour = board.vary(colours[board.rng.integers(len(colours))], 6)
    board.depth = 0.42
    board.disc((0, 0), 1.0, colour, 130, vessel=True)
    board.disc((0, 0), inner + 0.06, mix(colour, BLACK, 0.25), 70)
    fill(board, broth, inner)


def fill(board: Board, broth: Colour, radius: float) -> None:
    """Fill a disc with unevenly mixed sauce or broth."""
    tone = board.vary(broth, 7)
    board.disc((0, 0), radius, tone, 40)
    drift = clouds(board.rng, *board.height.size, 4)
    board.blend((drift * 0.35 * board.inside(radius)), mix(tone, WHITE, 0.3))
    board.blend((-drift * 0.35 * board.inside(radius)), mix(tone, BLACK, 0.3))


def tray(board: Board, colours: tuple[Colour, ...], half_width: float) -> None:
    """Draw a long plate or wooden board."""
    colour = board.vary(colours[board.rng.integers(len(colours))], 6)
    board.polygon(box((0, 0), (0.99, half_width), 0.0), colour, 90, vessel=True)
    board.polygon(box((0, 0), (0.92, half_width - 0.07), 0.0), mix(colour, BLACK, 0.06), 70)


def scallions(board: Board, count: int, radius: float) -> None:
    """Draw chopped scallion: little green rings and slanting slices."""
    for at in board.scatter(count, radius):
        green = board.vary(SCALLION, 16)
        size = board.rng.uniform(0.025, 0.05)
        board.blob(at, (size, size * board.rng.uniform(0.5, 1)), board.rng.uniform(0, 3), green, 120)
        board.disc(at, size * 0.4, mix(green, WHITE, 0.5), 105)


def flecks(board: Board, count: int, radius: float, colour: Colour, size: float = 0.012) -> None:
    """Draw seeds, flakes or peppercorns."""
    for at in board.scatter(count, radius):
        board.disc(at, board.rng.uniform(0.6, 1.3) * size, board.vary(colour, 14), 140)


def froth(board: Board, count: int, radius: float, colour: Colour) -> None:
    """Draw bubbles and drops of fat on a broth."""
    for at in board.scatter(count, radius):
        size = board.rng.uniform(0.012, 0.04)
        board.disc(at, size, board.vary(colour, 8), 52)
        board.disc((at[0] - size * 0.2, at[1] - size * 0.2), size * 0.6, mix(colour, WHITE, 0.25), 44)


def seaweed_soup(board: Board) -> None:
    """Draw 미역국: dark green ribbons and a little beef in a thin, olive broth."""
    rng = board.rng
    bowl(board, (WHITE, WHITE, CELADON), (132, 138, 82))
    froth(board, int(rng.integers(15, 40)), 0.8, (176, 172, 104))
    for at in board.scatter(int(rng.integers(34, 52)), 0.7):
        green = board.vary((38, 60, 32), 12)
        points = wave(at, rng.uniform(0, 6.3), rng.uniform(0.3, 0.65), rng.uniform(0.03, 0.1), rng.uniform(0, 6))
        board.stroke(points, rng.uniform(0.08, 0.15), green, rng.uniform(60, 110))
    for at in board.scatter(int(rng.integers(3, 9)), 0.6):
        size = (rng.uniform(0.08, 0.14), rng.uniform(0.05, 0.09))
        board.blob(at, size, rng.uniform(0, 3), board.vary((134, 100, 78)), 130, 0.2)


def kimchi(board: Board) -> None:
    """Draw 배추김치: red folds of cabbage with pale ribs, cut and lined up on a small plate."""
    rng = board.rng
    plate(board, (WHITE, WHITE, CELADON), 0.78)
    lean, rows = rng.uniform(-0.25, 0.25), int(rng.integers(2, 4))
    board.blob((0, 0), (0.66, 0.5), lean, board.vary((176, 52, 28)), 70, 0.08)
    for row in range(rows):
        middle = (row - (rows - 1) / 2) * 0.42
        for place in np.linspace(-0.52, 0.52, int(rng.integers(7, 11))):
            at = (float(place), middle + rng.normal(0, 0.04))
            leaf(board, at, lean + np.pi / 2 + rng.normal(0, 0.22), rng.uniform(0.2, 0.3))
    flecks(board, 120, 0.66, (150, 24, 14), 0.011)
    flecks(board, int(rng.integers(0, 30)), 0.5, (236, 214, 160), 0.014)
    if rng.random() < 0.5:
        scallions(board, int(rng.integers(3, 10)), 0.5)


def leaf(board: Board, at: Point, angle: float, length: float) -> None:
    """Draw one fold of kimchi: a red leaf with a pale rib. Its tip may be green."""
    rng = board.rng
    red = board.vary(mix((186, 46, 30), (170, 76, 40), rng.uniform(0, 1)), 14)
    board.blob(at, (length, rng.uniform(0.07, 0.12)), angle, red, rng.uniform(90, 160), 0.2)
    rib = mix(red, (244, 222, 160), rng.uniform(0.4, 0.95))
    board.stroke(wave(at, angle, length * 1.5, 0.02, rng.uniform(0, 6)), rng.uniform(0.04, 0.1), rib, 175)
    if rng.random() < 0.35:
        tip = (at[0] + length * 0.8 * np.cos(angle), at[1] + length * 0.8 * np.sin(angle))
        board.blob(tip, (0.09, 0.06), angle, board.vary((120, 120, 44)), 150, 0.2)


def rice_cakes(board: Board) -> None:
    """Draw 송편: glossy half-moons of white, green, pink and yellow rice cake on pine needles."""
    rng = board.rng
    plate(board, (WHITE, CREAM, (196, 160, 108)), 0.84)
    board.blob((0, 0), (0.76, 0.74), 0, board.vary((84, 122, 62), 8), 64, 0.05)
    for at in board.scatter(int(rng.integers(110, 160)), 0.76):
        board.stroke(wave(at, rng.uniform(0, 6.3), 0.36, 0.01, 0), 0.02, board.vary((62, 108, 50)), 75)
    doughs = [(242, 236, 222), (240, 160, 176), (242, 206, 96), (160, 186, 104)]
    used = [*doughs[: int(rng.integers(2, 5))], doughs[1]]
    for at in board.spread(int(rng.integers(13, 18)), 0.66):
        half_moon(board, at, rng.uniform(0, 6.3), rng.uniform(0.24, 0.29), used[rng.integers(len(used))])


def half_moon(board: Board, at: Point, angle: float, size: float, dough: Colour) -> None:
    """Draw one rice cake: a half-moon with a pressed seam along its round side."""
    colour = board.vary(dough, 6)
    turn = np.linspace(-0.15, np.pi + 0.15, 16)
    x, y = size * np.cos(turn), size * 0.95 * np.sin(turn) - size * 0.3
    c, s = np.cos(angle), np.sin(angle)
    for share, tone, height in (
        (1.0, mix(colour, BLACK, 0.12), 120),
        (0.82, colour, 165),
        (0.5, mix(colour, WHITE, 0.2), 200),
    ):
        px, py = at[0] + share * (c * x - s * y), at[1] + share * (s * x + c * y)
        board.polygon(list(zip(px.tolist(), py.tolist(), strict=True)), tone, height)


def black_noodles(board: Board) -> None:
    """Draw 짜장면: pale noodles under a near-black sauce, with cucumber strips and peas."""
    rng = board.rng
    bowl(board, (WHITE, CELADON, (120, 158, 128)), (206, 164, 98))
    for at in board.scatter(70, 0.72):
        tone = board.vary((222, 190, 122), 12)
        points = wave(at, rng.uniform(0, 6.3), rng.uniform(0.3, 0.7), 0.06, rng.uniform(0, 6))
        board.stroke(points, 0.03, tone, rng.uniform(60, 110))
    off = (rng.normal(0, 0.08), rng.normal(0, 0.08))
    reach = rng.uniform(0.6, 0.76)
    board.blob(off, (reach, reach * rng.uniform(0.8, 1)), rng.uniform(0, 3), board.vary((58, 32, 18), 6), 120, 0.16)
    for x, y in board.scatter(int(rng.integers(25, 45)), reach * 0.85):
        chunk = board.vary(((70, 42, 26), (104, 72, 40), (34, 20, 16))[rng.integers(3)], 8)
        board.blob((off[0] + x, off[1] + y), (0.07, 0.05), rng.uniform(0, 3), chunk, rng.uniform(130, 190), 0.2)
    heap = board.scatter(1, 0.25)[0]
    for _ in range(int(rng.integers(6, 18))):
        at = (heap[0] + rng.normal(0, 0.06), heap[1] + rng.normal(0, 0.06))
        board.stroke(wave(at, rng.normal(0.5, 0.4), 0.32, 0.01, 0), 0.026, board.vary((150, 186, 96)), 210)
    for at in board.scatter(int(rng.integers(0, 7)), 0.4):
        board.disc(at, 0.035, board.vary((98, 150, 56)), 220)


def rice_rolls(board: Board) -> None:
    """Draw 김밥: slices of a black-rimmed rice roll with a bright filling, in rows."""
    rng = board.rng
    rows, count = int(rng.integers(2, 4)), 4
    size = 0.25 if rows == 3 else 0.28
    if rows == 2 or rng.random() < 0.6:
        tray(board, (WHITE, (150, 104, 66), BLACK), 0.16 + size * rows)
    else:
        plate(board, (WHITE, (150, 104, 66), BLACK), 0.84)
    core = [(240, 200, 60), (226, 120, 44), (70, 120, 52), (228, 130, 130), (120, 78, 50), (250, 240, 220)]
    fillings = [core[i] for i in rng.permutation(6)[:5]]
    for row in range(rows):
        for place in range(count):
            x = (place - (count - 1) / 2) * size * 1.72 + rng.normal(0, 0.012)
            y = (row - (rows - 1) / 2) * size * 2.1 + rng.normal(0, 0.02)
            roll(board, (x, y), size * rng.uniform(0.94, 1.04), fillings)
    flecks(board, int(rng.integers(0, 60)), 0.6, (240, 222, 176), 0.013)


def roll(board: Board, at: Point, size: float, fillings: list[Colour]) -> None:
    """Draw one slice of gimbap: seaweed, a ring of rice grains, and the fillings in the middle."""
    rng = board.rng
    board.disc(at, size, board.vary((26, 34, 26), 4), 150)
    board.disc(at, size * 0.9, board.vary((236, 232, 220), 4), 165)
    for x, y in board.scatter(16, size * 0.82):
        grain = (at[0] + x, at[1] + y)
        board.blob(grain, (size * 0.13, size * 0.07), rng.uniform(0, 3), board.vary((246, 243, 234), 7), 180)
    start = rng.uniform(0, 6.3)
    for i, filling in enumerate(fillings):
        angle = start + i * 6.28 / len(fillings)
        place = (at[0] + size * 0.3 * np.cos(angle), at[1] + size * 0.3 * np.sin(angle))
        board.polygon(box(place, (size * 0.24, size * 0.2), rng.uniform(0, 3)), board.vary(filling, 8), 190)


def spicy_rice_cakes(board: Board) -> None:
    """Draw 떡볶이: thick rice sticks and fishcake in a shining red sauce."""
    rng = board.rng
    sauce = (214, 56, 20)
    if rng.random() < 0.4:
        plate(board, (WHITE, (112, 176, 150)), 0.84)
        fill(board, sauce, 0.8)
    else:
        bowl(board, (WHITE, STEEL, (112, 176, 150)), sauce)
    lean = rng.uniform(0, 3.1)
    for at in board.scatter(int(rng.integers(22, 36)), 0.62):
        stick = board.vary(mix((240, 120, 50), (228, 80, 28), rng.uniform(0, 1)), 8)
        points = wave(at, lean + rng.normal(0, 0.7), rng.uniform(0.3, 0.42), rng.uniform(0, 0.04), rng.uniform(0, 6))
        height = rng.uniform(80, 190)
        board.stroke(points, 0.125, mix(stick, BLACK, 0.18), height)
        board.stroke(points, 0.075, mix(stick, (255, 190, 120), 0.25), height + 40)
    for at in board.scatter(int(rng.integers(2, 8)), 0.6):
        cake = ring(rng, at, (0.2, 0.17), rng.uniform(0, 6.3), 0.03, corners=3)
        board.polygon(cake, board.vary((204, 128, 66), 10), 170)
    scallions(board, int(rng.integers(4, 22)), 0.6)
    flecks(board, int(rng.integers(10, 60)), 0.6, (240, 220, 170), 0.013)
    if rng.random() < 0.35:
        at = board.scatter(1, 0.4)[0]
        board.blob(at, (0.2, 0.16), rng.uniform(0, 3), (246, 240, 226), 210, 0.02)
        board.disc(at, 0.09, board.vary(EGG, 8), 225)


def scallion_pancake(board: Board) -> None:
    """Draw 파전: one broad golden pancake with long scallions laid side by side."""
    rng = board.rng
    plate(board, (WHITE, CELADON, (150, 104, 66)), 0.84)
    batter = board.vary((214, 162, 84), 10)
    reach = rng.uniform(0.8, 0.9)
    edge = ring(rng, (0, 0), (reach, reach * rng.uniform(0.86, 1)), rng.uniform(0, 3), 0.05, corners=48)
    board.polygon(edge, mix(batter, (120, 70, 30), 0.45), 90)
    board.polygon([(x * 0.94, y * 0.94) for x, y in edge], batter, 110)
    patches = clouds(rng, *board.height.size, 7) * board.inside(reach * 0.88)
    board.blend(patches * 0.55, (158, 96, 40))
    board.blend(-patches * 0.4, (238, 206, 130))
    lean = rng.uniform(0, 3.1)
    for at in board.scatter(int(rng.integers(26, 44)), reach * 0.74):
        green = board.vary(mix((92, 140, 52), (196, 206, 140), rng.uniform(0, 0.7)), 12)
        points = wave(at, lean + rng.normal(0, 0.1), rng.uniform(0.3, 0.55), 0.015, rng.uniform(0, 6))
        board.stroke(points, rng.uniform(0.025, 0.055), green, rng.uniform(120, 150))
    for at in board.scatter(int(rng.integers(3, 12)), reach * 0.7):
        kind = ((196, 48, 34), (236, 186, 160), (222, 150, 130))[rng.integers(3)]
        board.blob(at, (0.07, 0.03), rng.uniform(0, 3), board.vary(kind), 155, 0.2)
    if rng.random() < 0.3:
        for turn in (lean, lean + 1.57):
            board.stroke(wave((0, 0), turn, reach * 1.7, 0, 0), 0.016, (110, 72, 36), 70)


def bean_paste_stew(board: Board) -> None:
    """Draw 된장찌개: a black earthen pot of brown stew with white tofu, courgette and chilli."""
    rng = board.rng
    bowl(board, (BLACK, BLACK, (72, 50, 40)), (156, 104, 52), 0.8)
    froth(board, int(rng.integers(30, 70)), 0.76, (190, 142, 82))
    for at in board.scatter(int(rng.integers(5, 11)), 0.6):
        green = board.vary((150, 170, 84), 8)
        size = rng.uniform(0.13, 0.18)
        slab = ring(rng, at, (size, size), 0, 0.02)
        board.polygon(slab, mix(green, (60, 110, 40), 0.6), 105)
        board.disc(at, size * 0.84, mix(green, (232, 226, 160), 0.5), 115)
    for at in board.scatter(int(rng.integers(6, 12)), 0.6):
        angle, size = rng.uniform(0, 3), rng.uniform(0.1, 0.15)
        board.polygon(box((at[0] + 0.02, at[1] + 0.03), (size, size), angle), (176, 150, 110), 120)
        board.polygon(box(at, (size, size * rng.uniform(0.8, 1)), angle), board.vary((240, 228, 198), 5), 180)
    for at in board.scatter(int(rng.integers(3, 9)), 0.6):
        chilli = board.vary(CHILLI if rng.random() < 0.6 else (80, 130, 50), 10)
        board.blob(at, (0.05, 0.035), rng.uniform(0, 3), chilli, 170)
        board.disc(at, 0.015, mix(chilli, WHITE, 0.6), 165)
    scallions(board, int(rng.integers(4, 16)), 0.6)


def ox_bone_soup(board: Board) -> None:
    """Draw 곰탕·설렁탕: milk-white broth with thin noodles, slices of meat and scallion."""
    rng = board.rng
    bowl(board, (BLACK, BLACK, (72, 50, 40)), (232, 226, 210), 0.84)
    for at in board.scatter(int(rng.integers(0, 26)), 0.5):
        points = wave(at, rng.uniform(0, 6.3), 0.5, 0.07, rng.uniform(0, 6))
        board.stroke(points, 0.018, board.vary((246, 240, 222), 4), 60)
    for at in board.scatter(int(rng.integers(4, 10)), 0.5):
        meat = board.vary((150, 116, 92), 10)
        size, angle = (rng.uniform(0.18, 0.28), rng.uniform(0.09, 0.14)), rng.uniform(0, 3)
        board.blob(at, size, angle, meat, rng.uniform(80, 120), 0.14)
        board.stroke(wave(at, angle, size[0] * 1.3, 0.02, 0), 0.02, mix(meat, WHITE, 0.35), 125)
    heap = board.scatter(1, 0.4)[0]
    for _ in range(int(rng.integers(12, 40))):
        at = (heap[0] + rng.normal(0, 0.14), heap[1] + rng.normal(0, 0.14))
        green = board.vary(mix(SCALLION, WHITE, rng.uniform(0, 0.4)), 12)
        board.blob(at, (0.045, 0.03), rng.uniform(0, 3), green, 140)
    flecks(board, int(rng.integers(0, 50)), 0.6, (70, 60, 50), 0.008)


def fried_prawns(board: Board) -> None:
    """Draw 새우튀김: crisp golden prawns with red tails, side by side, perhaps with a lemon or a dip."""
    rng = board.rng
    if rng.random() < 0.5:
        tray(board, (WHITE, BLACK), rng.uniform(0.66, 0.82))
    else:
        plate(board, (WHITE, BLACK, BLUE), 0.84)
    board.polygon(box((0, 0), (0.78, 0.54), rng.normal(0, 0.15)), board.vary((240, 236, 224), 4), 80)
    count, lean = int(rng.integers(4, 7)), rng.normal(np.pi / 2, 0.2)
    for place in np.linspace(-0.58, 0.58, count):
        flip = np.pi if rng.random() < 0.25 else 0.0
        prawn(board, (float(place), rng.normal(0, 0.05)), lean + flip + rng.normal(0, 0.12))
    side = rng.random()
    at = (0.62 * (1 if rng.random() < 0.5 else -1), rng.uniform(-0.15, 0.15))
    if side < 0.3:
        board.disc(at, 0.2, board.vary(WHITE, 4), 150)
        board.disc(at, 0.16, (60, 36, 22), 90)
    elif side < 0.6:
        board.blob(at, (0.17, 0.1), rng.uniform(0, 3), (240, 214, 80), 150, 0.05)


def prawn(board: Board, at: Point, angle: float) -> None:
    """Draw one fried prawn: a bent body of crumbs, thinner towards a red, fan-shaped tail."""
    rng = board.rng
    crust = board.vary((216, 150, 62), 10)
    spine = wave(at, angle, rng.uniform(0.8, 0.95), rng.uniform(0.02, 0.07), rng.uniform(0, 6), steps=12)
    for i, point in enumerate(spine):
        size = 0.125 * (1 - 0.45 * i / 11)
        board.blob(point, (size, size), 0, board.vary(crust, 10), 130 + rng.uniform(0, 40), 0.15)
        for _ in range(5):
            crumb = (point[0] + rng.normal(0, size * 0.6), point[1] + rng.normal(0, size * 0.6))
            board.disc(
                crumb,
                rng.uniform(0.012, 0.026),
                board.vary(mix(crust, (250, 214, 130), 0.4), 14),
                rng.uniform(150, 210),
            )
    (x1, y1), (x0, y0) = spine[-1], spine[-2]
    out = float(np.arctan2(y1 - y0, x1 - x0))
    for turn in (-0.45, 0.0, 0.45):
        tip = (x1 + 0.09 * np.cos(out + turn), y1 + 0.09 * np.sin(out + turn))
        board.blob(tip, (0.075, 0.03), out + turn, board.vary((206, 74, 36), 10), 170)


PAINTERS: dict[int, Callable[[Board], None]] = {
    17: seaweed_soup,
    33: kimchi,
    48: rice_cakes,
    57: black_noodles,
    69: rice_rolls,
    82: spicy_rice_cakes,
    103: scallion_pancake,
    122: bean_paste_stew,
    136: ox_bone_soup,
    141: fried_prawns,
}
GLOSS: dict[int, float] = {17: 0.6, 33: 0.7, 48: 0.8, 57: 0.8, 69: 0.3, 82: 1.0, 103: 0.4, 122: 0.5, 136: 0.4, 141: 0.4}
