"""`kfood verify`: check that a packed folder is what its manifest says, down to every picture.

    manifest ──► each shard: size, SHA-256 ──► its index: hash, rows ──► its members: place, crc32, JSON, JPEG
            └──► the folder: shards that the manifest does not name, and the list of rejected inputs
            └──► all indexes: counts per split and class, groups that are in one split only

Every fault is reported. A fault hides others only if it leaves nothing to check.
"""

import argparse
import json
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from kfood_dist.data.picture.images import ImageRejected, decode_rgb
from kfood_dist.data.shards.manifest import MANIFEST_NAME, REJECTED_NAME, SPLITS, Manifest, ShardFile, load_manifest
from kfood_dist.data.shards.reader import NO_LABEL, load_index
from kfood_dist.data.shards.sample import picture_suffix, sample_key
from kfood_dist.data.shards.tars import Member, members
from kfood_dist.data.task.dish import DishClass
from kfood_dist.errors import ShardError
from kfood_dist.system.files import file_sha256
from kfood_dist.system.processes import available_cores
from kfood_dist.system.words import plural


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: `path` is the file within the folder, `what` says what is wrong with it."""

    path: str
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `kfood verify`."""
    parser.add_argument("shards", type=local_folder, metavar="SHARDS", help="a folder that `kfood pack` wrote")


def local_folder(text: str) -> Path:
    """Return the folder at this path. Refuses a URL, because every byte is read several times."""
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text}: give a folder; copy the shards to this machine, or run this command where they are stored"
        )
    return Path(text)


def run(args: argparse.Namespace) -> int:
    """Print every fault, or one line if there is none. Returns the exit status: 1 if there is a fault, else 0."""
    faults = verify(args.shards)
    for fault in faults:
        print(fault)
    if faults:
        print(f"{plural(len(faults), 'fault')} in {args.shards}: restore these files, or pack the source again")
        return 1
    manifest = load_manifest(args.shards)
    num_samples = sum(shard.samples for shard in manifest.shards)
    num_bytes = sum(shard.bytes for shard in manifest.shards)
    num_shards = len(manifest.shards)
    found = f"{plural(num_samples, 'sample')} in {plural(num_shards, 'shard')}"
    print(f"{args.shards}: no faults: {found}, {num_bytes:,} bytes")
    return 0


def verify(folder: Path, show_progress: bool = True) -> list[Fault]:
    """Return every fault of a packed folder, in the order of its shards. The list is empty if there is no fault.

    Raises ShardError if the folder does not exist.
    """
    try:
        manifest = load_manifest(folder)
    except ShardError as error:
        if not os.path.isdir(folder):
            raise
        return [Fault(MANIFEST_NAME, error.what)]
    # Threads are enough, because hashing, checksums and decoding release the interpreter lock (GIL).
    with ThreadPoolExecutor(available_cores()) as pool:
        checked = pool.map(lambda shard: _check_shard(manifest, shard), manifest.shards)
        disable = None if show_progress else True
        results = list(tqdm(checked, "verify", len(manifest.shards), unit="shard", disable=disable))
    faults = [fault for found, _ in results for fault in found]
    indexes = [index for _, index in results]
    faults += _check_folder(manifest)
    if all(index is not None for index in indexes):
        faults += _check_counts(manifest, [index for index in indexes if index is not None])
    return faults


def verify_some(manifest: Manifest, splits: Sequence[str]) -> tuple[list[str], list[Fault]]:
    """Check the first shard of each given split. Returns the names of these shards and all their faults."""
    chosen = [shard for split in dict.fromkeys(splits) for shard in manifest.shards_of(split)[:1]]
    return [shard.path for shard in chosen], [fault for shard in chosen for fault in _check_shard(manifest, shard)[0]]


def count_samples(classes: Sequence[DishClass], indexes: Sequence[np.ndarray]) -> dict[str, Any]:
    """Return what the manifest states about one split, counted from its shards' indexes.

    These are the numbers of samples, groups, and samples per class.
    """
    labels = Counter(label for index in indexes for label in index["label"].tolist())
    groups = {group for index in indexes for group in index["group"].tolist()}
    return {
        "samples": labels.total(),
        "groups": len(groups),
        "per_class": {dish.name: labels[i] for i, dish in enumerate(classes)},
    }


def _check_shard(manifest: Manifest, shard: ShardFile) -> tuple[list[Fault], np.ndarray | None]:
    faults: list[Fault] = []
    index = None
    try:
        index = load_index(manifest, shard)
    except ShardError as error:
        faults.append(Fault(shard.index_path, error.what))
    path = manifest.folder / shard.path
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            faults.append(Fault(shard.path, f"has {size:,} bytes, not the {shard.bytes:,} of the manifest"))
        elif file_sha256(path) != shard.sha256:
            faults.append(Fault(shard.path, "does not have the SHA-256 of the manifest"))
        if index is not None:
            faults += (Fault(shard.path, what) for what in _check_members(manifest, index, path))
    except OSError as error:
        faults.append(Fault(shard.path, f"cannot be read ({error.strerror})"))
    return faults, index


def _check_members(manifest: Manifest, index: np.ndarray, path: Path) -> Iterator[str]:
    """Compare each sample's members with its index row, and yield the faults.

    A tar that was cut short is one fault, not one per lost sample.
    """
    expected: dict[str, int] = {}
    for number, row in enumerate(index):
        key = row["key"].decode("ascii", errors="replace")
        suffixes = (*map(picture_suffix, range(int(row["num_images"]))), "json")
        expected |= {f"{key}.{suffix}": number for suffix in suffixes}
    num_members, runs = len(expected), dict[int, list[Member]]()
    try:
        with path.open("rb") as file:
            for member in members(path):
                if member.name not in expected:
                    yield f"holds {member.name}, which is not in its index"
                    continue
                number = expected.pop(member.name)
                runs.setdefault(number, []).append(member)
                if len(runs[number]) == index[number]["num_images"] + 1:
                    yield from _check_sample(manifest, index[number], runs.pop(number), file)
    except tarfile.TarError as error:
        yield f"is not a complete tar ({error})"
    if expected:
        yield f"lacks {len(expected):,} of {num_members:,} members; the first is {next(iter(expected))}"


def _check_sample(manifest: Manifest, row: np.void, run: list[Member], file: BinaryIO) -> Iterator[str]:
    """Yield the faults of one sample. `run` holds all its members, in the order of the tar."""
    key, num_bytes = row["key"].decode("ascii", errors="replace"), run[-1].end - run[0].start
    if (run[0].start, num_bytes) != (row["offset"], row["size"]):
        yield f"{key} is not where its index says"
    file.seek(run[0].start)
    if zlib.crc32(file.read(num_bytes)) != row["crc32"]:
        yield f"{key} has wrong bytes (crc32 differs)"
        return
    for member in run:
        if member.name.endswith(".json"):
            yield from _check_json(manifest, row, member)
        else:
            yield from _check_picture(manifest, member)


def _check_picture(manifest: Manifest, member: Member) -> Iterator[str]:
    try:
        height, width, _ = decode_rgb(member.data).shape
    except ImageRejected as error:
        yield f"{member.name} does not decode ({error.detail})"
        return
    if (width, height) != (manifest.image_size, manifest.image_size):
        yield f"{member.name} is {width}×{height}, but the manifest says {manifest.image_size}×{manifest.image_size}"


def _check_json(manifest: Manifest, row: np.void, member: Member) -> Iterator[str]:
    try:
        fields = json.loads(member.data)
        group, columns = fields["group"], [fields[name] for name in manifest.columns]
        width, height, num_sources = fields["width"], fields["height"], len(fields["sources"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        yield f"{member.name} is not a sample's JSON ({type(error).__name__}: {error})"
        return
    if not all(isinstance(value, str) for value in columns):
        yield f"{member.name} has a column that is not text"
        return
    if (width, height) != (manifest.image_size, manifest.image_size):
        yield f"{member.name} says {width!r}×{height!r}, the manifest says {manifest.image_size}×{manifest.image_size}"
    if num_sources != row["num_images"]:
        pictures = plural(int(row["num_images"]), "picture")
        yield f"{member.name} names {plural(num_sources, 'source')}, but its index has {pictures}"
    if row["label"] != NO_LABEL:
        dish = manifest.classes[int(row["label"])]
        found = fields.get("label"), fields.get("category"), group
        if found != (dish.name, dish.category, int(row["group"])):
            yield f"{member.name} contradicts its index"
    elif group != int(row["group"]):
        yield f"{member.name} contradicts its index"


def _check_folder(manifest: Manifest) -> Iterator[Fault]:
    """Yield each shard and index that the manifest does not name, and a wrong list of rejected inputs."""
    rejected = manifest.folder / REJECTED_NAME
    try:
        if file_sha256(rejected) != manifest.raw["rejected"]["sha256"]:
            yield Fault(REJECTED_NAME, "does not have the SHA-256 of the manifest")
    except OSError as error:
        yield Fault(REJECTED_NAME, f"cannot be read ({error.strerror})")
    known = {shard.path for shard in manifest.shards} | {shard.index_path for shard in manifest.shards}
    for path in sorted(manifest.folder.iterdir()):
        if path.name.endswith((".tar", ".index.npy")) and path.name not in known:
            yield Fault(path.name, "is not in the manifest")


def _check_counts(manifest: Manifest, indexes: list[np.ndarray]) -> Iterator[Fault]:
    """Compare the manifest's counts with the indexes, and yield the faults.

    Also checks that the keys of a split are numbered in order from 0, and that each group is in one split only. The
    split that a source came with may put one group into several splits. The manifest states how many such groups there
    are.
    """
    by_split: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for shard, index in zip(manifest.shards, indexes, strict=True):
        by_split[shard.split].append(index)
    counts = {split: count_samples(manifest.classes, parts) for split, parts in by_split.items()}
    if manifest.raw.get("splits") != counts:
        yield Fault(MANIFEST_NAME, "states other counts of samples, groups or samples per class than the indexes")
    owner: dict[int, str] = {}
    groups_in_other_splits: dict[str, set[int]] = {}
    for split, parts in by_split.items():
        keys = [key for part in parts for key in part["key"].tolist()]
        if keys != [sample_key(split, number).encode("ascii") for number in range(len(keys))]:
            yield Fault(MANIFEST_NAME, f"has keys in {split} that are not numbered in order from 0")
        groups = {group for part in parts for group in part["group"].tolist()}
        groups_in_other_splits[split] = {group for group in groups if owner.setdefault(group, split) != split}
    if (stated := manifest.groups_across) == 0:
        for split, groups in groups_in_other_splits.items():
            if groups:
                yield Fault(MANIFEST_NAME, f"has {len(groups)} groups in {split} that are also in another split")
    elif (across := len(set().union(*groups_in_other_splits.values()))) != stated:
        yield Fault(MANIFEST_NAME, f"states {stated} groups in several splits, but the indexes have {across}")
