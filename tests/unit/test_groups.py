"""Near-duplicates: the groups are exact for any set of hashes, and sensible for pictures."""

import hashlib
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from kfood_dist.data.picture.images import prepare_jpeg
from kfood_dist.pack.groups import ALIKE, NEAR, group_pictures, near_pairs
from kfood_dist.pack.place import count_random_split_leaks
from kfood_dist.pack.prepare import Place, Prepared, perceptual_hash
from kfood_dist.pack.sources import Record
from kfood_dist.pack.split import assign_splits, parse_fractions
from kfood_dist.practice.pictures import DISHES, write_pictures


def made(source: str, hashed: int = 0, sha256: str | None = None, label: str = "약과") -> Prepared:
    digest = sha256 or hashlib.sha256(f"{source} {hashed}".encode()).hexdigest()
    return Prepared(Record(Path("x"), source, label), "chunk", (Place(0, 1, digest, hashed),))


def joined(*singles: Prepared) -> Prepared:
    """Return one sample of several pictures."""
    first, *more = (single.record for single in singles)
    return Prepared(
        replace(first, more=tuple(more)), "chunk", tuple(place for single in singles for place in single.places)
    )


def flipped(value: int, bits: list[int]) -> int:
    for bit in bits:
        value ^= 1 << bit
    return value


# Few base values and few flips, so that near pairs are common.
hashes = st.lists(
    st.builds(flipped, st.sampled_from([0, 2**64 - 1, 0x0123456789ABCDEF]), st.lists(st.integers(0, 63), max_size=9)),
    max_size=40,
)


@given(hashes, st.integers(0, 7))
def test_near_pairs_equal_those_of_brute_force(values: list[int], distance: int) -> None:
    array = np.array(values, dtype=np.uint64)
    expected = [
        (i, j)
        for i in range(len(values))
        for j in range(i + 1, len(values))
        if (values[i] ^ values[j]).bit_count() <= distance
    ]
    assert [tuple(pair) for pair in near_pairs(array, distance).tolist()] == expected


@given(hashes, st.integers(0, 3), st.randoms())
def test_groups_are_the_connected_near_duplicates_in_any_order(values: list[int], step: int, random) -> None:
    pictures = [made(f"구이/{i % 2}/Img_{i // 2 * (step + 1):04d}.jpg", value) for i, value in enumerate(values)]
    parent = list(range(len(pictures)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    places = [picture.places[0] for picture in pictures]
    for i, a in enumerate(places):
        for j, b in enumerate(places):
            differing = (a.perceptual_hash ^ b.perceptual_hash).bit_count()
            next_in_series = i % 2 == j % 2 and abs(i - j) == 2 and step + 1 <= 2
            if differing <= NEAR or (next_in_series and differing <= ALIKE) or a.sha256 == b.sha256:
                parent[root(i)] = root(j)
    groups = group_pictures(pictures)
    for i in range(len(pictures)):
        for j in range(i):
            assert (groups[i] == groups[j]) == (root(i) == root(j))
    order = list(range(len(pictures)))
    random.shuffle(order)
    assert group_pictures([pictures[i] for i in order]) == [groups[i] for i in order]


def test_pictures_of_equal_bytes_are_one_group_whatever_their_crop() -> None:
    """Two copies with different crop boxes look different after packing."""
    one, two, three = made("a.jpg", 0, "5" * 64), made("b.jpg", 2**64 - 1, "5" * 64), made("c.jpg", 2**32 - 1)
    groups = group_pictures([one, two, three])
    assert groups[0] == groups[1] == int("5" * 13, 16) != groups[2]


def test_samples_are_one_group_if_any_two_of_their_pictures_are_near_duplicates() -> None:
    far = [0, 2**64 - 1, 0x00000000FFFFFFFF, 0xFFFFFFFF00000000, 0x0000FFFF0000FFFF]
    a, b, c, d, e = (made(f"{name}.jpg", value) for name, value in zip("abcde", far, strict=True))
    first, second, third = joined(a, b), joined(c, made("b.jpg", far[1])), joined(d, e)
    groups = group_pictures([first, second, third])
    assert groups[0] == groups[1] != groups[2]
    lowest = min(place.sha256 for sample in (first, second) for place in sample.places)
    assert groups[0] == int(lowest[:13], 16)
    assert len(set(group_pictures([joined(a, c), joined(d, made("again.jpg", flipped(far[2], [0, 9]))), b]))) == 2
    pages = [
        joined(a, made("d/Img_0001.jpg", c.places[0].perceptual_hash)),
        joined(b, made("d/Img_0002.jpg", 2**32 - 256)),
    ]
    # Neighbours by number, although neither is the first picture of its sample.
    assert len(set(group_pictures(pages))) == 1


def test_numbers_alone_join_no_pictures_and_neighbours_must_be_of_one_series() -> None:
    far = [0, 2**64 - 1, 0x00000000FFFFFFFF, 0xFFFFFFFF00000000]
    assert len(set(group_pictures([made(f"d/Img_{i:04d}.jpg", value) for i, value in enumerate(far)]))) == 4
    alike = flipped(0, list(range(ALIKE)))
    sources = [("d/Img_0001.jpg", "d/Img_0002.jpg", 1), ("d/Img_0001.jpg", "d/Img_0003.png", 1)]
    sources += [("d/Img_0001.jpg", "d/Img_0004.jpg", 2), ("d/Img_0001.jpg", "e/Img_0002.jpg", 2)]
    sources += [("d/Img_0001.jpg", "d/Pic_0002.jpg", 2), ("d/a.jpg", "d/b.jpg", 2)]
    for first, second, expected in sources:
        groups = group_pictures([made(first, 0), made(second, alike)])
        assert len(set(groups)) == expected, (first, second)


def test_thousands_of_equal_hashes_are_grouped_without_quadratic_work() -> None:
    pictures = [made(f"d/{i}x.jpg", i % 2) for i in range(20_000)]
    assert len(set(group_pictures(pictures))) == 1


def test_a_brighter_smaller_or_slightly_rotated_copy_stays_near() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC)
    variants = [image, image.resize((400, 300)), ImageEnhance.Brightness(image).enhance(1.15)]
    near = [perceptual_hash(packed(v)) for v in variants]
    assert max((a ^ b).bit_count() for a in near for b in near) <= NEAR
    turned = perceptual_hash(packed(image.rotate(5, resample=Image.Resampling.BICUBIC)))
    assert (near[0] ^ turned).bit_count() <= ALIKE
    other = np.random.default_rng(2).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    unrelated = perceptual_hash(packed(Image.fromarray(other).resize((640, 480), Image.Resampling.BICUBIC)))
    assert (near[0] ^ unrelated).bit_count() > ALIKE


def packed(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return prepare_jpeg(buffer.getvalue(), 224)


def test_practice_pictures_form_many_groups(tmp_path: Path) -> None:
    """Drawn pictures of one dish are numbered without gaps and look similar. They must not become one group."""
    list(write_pictures(tmp_path, DISHES[:3], 30, seed=0))
    pictures = [
        made(path.relative_to(tmp_path).as_posix(), perceptual_hash(prepare_jpeg(path.read_bytes(), 224)))
        for path in sorted(tmp_path.rglob("Img_*"))
    ]
    assert len(pictures) == 90
    assert len(set(group_pictures(pictures))) >= 75


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_pictures_that_a_random_split_would_leak_are_counted(size: int) -> None:
    """There are 200 plates with `size` photographs each. Split at random, most pictures have another one in train."""
    pictures = [
        made(f"d/{plate}-{shot}x.jpg", 0, f"{plate * 10 + shot:064x}") for plate in range(200) for shot in range(size)
    ]
    groups = [plate for plate in range(200) for _ in range(size)]
    fractions = parse_fractions("0.8,0.1,0.1")
    leaked = count_random_split_leaks(pictures, groups, fractions, seed=0)
    assert leaked == count_random_split_leaks(pictures, groups, fractions, seed=0)
    held_out = len(pictures) // 10
    # With probability 0.2 ** (size - 1), none of the other pictures of its plate is in train.
    expected = held_out * (1 - 0.2 ** (size - 1))
    assert set(leaked) == {"val", "test"}
    assert all(abs(count - expected) <= 0.15 * held_out for count in leaked.values())
    splits = assign_splits(groups, [p.record.label for p in pictures], fractions, 0)
    assert len({(g, s) for g, s in zip(groups, splits, strict=True)}) == 200
