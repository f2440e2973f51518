"""Packs a source into a folder, in steps that may be stopped at any point.

    scan ──► choose ──► chunks of records ──► this packer's part, one file each ──► what others have not prepared
                                                                                        │ (one packer)
    OUT appears in one rename ◄── verify ◄── tars + indexes ◄── splits ◄── groups ◄── merge

Always holds: the same source, options and seed give the same bytes, whatever the number of workers, of packers and of
stops; a packer that is not stopped finishes the complete job, even if other packers never return; OUT is complete or
untouched; memory grows with the source only by names and numbers, never by pictures.
"""

import hashlib
import os
import random
import unicodedata
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kfood_dist import __version__
from kfood_dist.data.shards.manifest import (
    FORMAT,
    MANIFEST_NAME,
    REJECTED_NAME,
    VERSION,
    Manifest,
    load_manifest,
    with_checksum,
)
from kfood_dist.data.shards.reader import open_split
from kfood_dist.data.shards.verify import verify
from kfood_dist.data.storage.open import open_storage
from kfood_dist.data.task.dish import DishClass, load_classes
from kfood_dist.errors import KfoodError, ShardError, SourceError
from kfood_dist.pack.chunks import Chunk, cut, is_there, load_chunk, prepare_chunk
from kfood_dist.pack.groups import group_pictures
from kfood_dist.pack.options import PackOptions, fingerprint
from kfood_dist.pack.place import classes_of, columns_of, count_random_split_leaks, place, refuse_ambiguous
from kfood_dist.pack.prepare import Prepared, Refusal, in_processes
from kfood_dist.pack.publisher import SourceSplit, assign, count_across, settle
from kfood_dist.pack.refused import by_reason, kept_list, rejected_csv, require_enough
from kfood_dist.pack.sources import Record, scan_source
from kfood_dist.pack.sources.names import file_name
from kfood_dist.pack.subset import choose_subset, count_short
from kfood_dist.pack.workspace import (
    discard,
    merging,
    publish,
    remove_work,
    require_renamable,
    require_space,
    shard_folder,
    work_folder,
    writing,
)
from kfood_dist.pack.write import ShardWriter
from kfood_dist.system.files import write_file

# A tar has a header for each member and rounds it up to 512 bytes. The JSON and the index row are small.
_OVERHEAD_BYTES = 2600
# A class id is a u2 in the index, and the highest value means no class.
_MAX_CLASSES = 2**16 - 1


@dataclass(frozen=True)
class Packed:
    """The result of packing.

    `manifest` is None while another packer puts the shards together. `reused` says that OUT already existed.
    `by_another` says that another packer made OUT while this one worked.
    """

    manifest: Manifest | None
    reused: bool = False
    by_another: bool = False


@dataclass(frozen=True)
class _Job:
    """A packing job whose inputs and options are settled, with what the manifest will say of them."""

    out: Path
    options: PackOptions
    records: list[Record]
    source: dict[str, Any]
    chosen_from: frozenset[str]
    own_split: SourceSplit | None


def pack(source: Path, out: Path, options: PackOptions) -> Packed:
    """Pack `source` into the new folder `out`, together with the packers of its other parts, if there are any.

    Raises SourceError if an option or the source cannot be used, if too many inputs are refused (the list is then in
    `OUT.rejected.csv`), or if `out` holds anything else. Raises KfoodError if the disk is full. After either error, the
    same call continues where it stopped.
    """
    options.check()
    out = Path(os.path.realpath(out))
    require_renamable(out)
    job = _settle(source, out, options)
    refused = [Refusal(r.source, r.label, r.problem, r.detail) for r in job.records if r.problem is not None]
    with writing(job.out):
        if (existing := _existing(job)) is not None:
            remove_work(job.out)  # left by a packer that was killed just after it published OUT
            return Packed(existing, reused=True)
        require_enough(job.out, len(job.records), refused, job.options)
    try:
        return _pack_part(job, refused)
    except KfoodError:
        # If another packer was faster, OUT already exists and the work folder that this packer needs is gone.
        finished = None
        with suppress(KfoodError, OSError):
            finished = _by_another(job)
        if finished is None:
            raise
        return finished


def _pack_part(job: _Job, refused: list[Refusal]) -> Packed:
    """Prepare this packer's chunks, then the chunks that others have not prepared, and put the shards together."""
    options = job.options
    chunks = cut([record for record in job.records if record.problem is None], options.picture_settings())
    with work_folder(job.out, options.part, options.parts) as work:
        if (finished := _by_another(job)) is not None:
            return finished
        _prepare(job, chunks[options.part - 1 :: options.parts], work / "chunks")
        left = [chunk for chunk in chunks if not is_there(chunk, work / "chunks")]
        # The packers of these chunks may still run, or may never return. In a random order, two packers seldom prepare
        # the same chunk.
        _prepare(job, random.sample(left, len(left)), work / "chunks")
        with merging(work) as mine:
            if not mine:
                return Packed(None)
            if (finished := _by_another(job)) is not None:
                return finished
            _merge(job, chunks, refused, work)
    kept_list(job.out).unlink(missing_ok=True)
    return Packed(load_manifest(job.out))


def _by_another(job: _Job) -> Packed | None:
    """Return the OUT that another packer made while this one worked, or None if there is none yet."""
    # NFS remembers for a while that a name did not exist. Opening the folder makes it ask the server again.
    os.scandir(job.out.parent).close()
    if (existing := _existing(job)) is None:
        return None
    remove_work(job.out)
    return Packed(existing, reused=True, by_another=True)


def _settle(source: Path, out: Path, options: PackOptions) -> _Job:
    listed = None if options.classes is None else load_classes(options.classes)
    found = scan_source(source, options.image_root, listed, options.encoding)
    num_classes = len(listed or {record.label for record in found.records if record.problem is None})
    if num_classes > _MAX_CLASSES:
        raise SourceError(
            f"{num_classes:,} classes are more than the {_MAX_CLASSES:,} that a data set can have",
            "name the classes with --classes, or check that the labels are names of dishes",
        )
    settled, own_split = settle(found.records, is_dealt=options.fractions is not None)
    records, chosen_from = choose_subset(settled, options.per_class, options.subset, options.seed)
    origin = {
        "kind": found.kind,
        "name": unicodedata.normalize("NFC", file_name(source.resolve().name)),
        "fingerprint": fingerprint(found.kind, records, listed, options),
        "crop_lists": asdict(found.boxes),
        "passed_by": found.ignored.as_json(),
    }
    return _Job(out, options, records, origin, chosen_from, own_split)


def _existing(job: _Job) -> Manifest | None:
    """Return the manifest of OUT, or None if there is nothing yet.

    Raises SourceError if OUT holds anything but the wanted data set, or if more than --max-rejected was refused. Raises
    ShardError if a file of it is missing or has another size.
    """
    out = job.out
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    another = "choose another OUT, or remove this one first"
    try:
        manifest = load_manifest(out)
    except ShardError as error:
        raise SourceError(f"{out} already exists and is not a packed data set ({error.what})", another) from None
    origin = manifest.raw.get("source")
    if not isinstance(origin, dict) or origin.get("fingerprint") != job.source["fingerprint"]:
        raise SourceError(f"{out} holds another data set: its source or its options differ", another)
    for split in manifest.splits:
        open_split(out, split).require_files()
    if (share := manifest.raw["rejected"]["share"]) > job.options.max_rejected:
        raise SourceError(
            f"{out} was packed with {share:.1%} of its inputs refused, above --max-rejected {job.options.max_rejected}",
            f"see {out / REJECTED_NAME}; repair the source, or raise --max-rejected",
        )
    return manifest


def _prepare(job: _Job, chunks: Sequence[Chunk], folder: Path) -> None:
    """Prepare the chunks that do not exist yet or cannot be used."""
    to_do = [chunk for chunk in chunks if load_chunk(chunk, folder) is None]
    in_all, left = (sum(len(chunk.records) for chunk in some) for some in (chunks, to_do))
    with tqdm(total=in_all, initial=in_all - left, desc="prepare", unit="sample", disable=None) as progress:
        do = partial(prepare_chunk, settings=job.options.picture_settings(), folder=folder)
        for done in in_processes(do, to_do, job.options.workers):
            progress.update(len(done.records))


def _merge(job: _Job, chunks: Sequence[Chunk], refused: list[Refusal], work: Path) -> None:
    """Make OUT from the prepared chunks."""
    options = job.options
    pictures, unusable = _gather(job, chunks, work / "chunks")
    pictures, ambiguous = refuse_ambiguous(pictures)
    refused = [*refused, *unusable, *ambiguous]
    require_enough(job.out, len(job.records), refused, job.options)
    classes = classes_of(pictures) if options.classes is None else load_classes(options.classes)
    groups = group_pictures(pictures)
    fractions, seed = options.shares(), options.seed
    splits = assign(groups, [picture.record for picture in pictures], job.own_split, fractions, seed)

    result = shard_folder(work, _shards_name(job, pictures))
    written = sum(path.stat().st_size for path in result.iterdir())
    require_space(result, sum(p.num_bytes + _OVERHEAD_BYTES * len(p.places) for p in pictures) - written)
    storage = open_storage(work / "chunks")
    writer = ShardWriter(result, storage, classes, options.image_size, options.shard_size)
    for split, samples in place(pictures, groups, splits, classes, seed).items():
        writer.write(split, samples)
    storage.close()
    rejected = rejected_csv(refused)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "image_size": options.image_size,
        "resize": options.resize,
        "jpeg_quality": options.quality,
        "seed": options.seed,
        "source": job.source,
        "chosen": _chosen(job, pictures, classes),
        "crop_boxes": _count_boxes(pictures) if options.crop_boxes else None,
        "class_list": options.classes is not None,
        "columns": columns_of(pictures),
        "classes": [{"name": c.name, "category": c.category, "aliases": c.aliases} for c in classes],
        "splits": writer.splits,
        "source_split": _describe_split(job.own_split, groups, splits),
        "random_split_would_leak": count_random_split_leaks(pictures, groups, fractions, seed),
        "rejected": {
            "count": len(refused),
            "share": round(len(refused) / len(job.records), 6),
            "by_reason": by_reason(refused),
            "sha256": hashlib.sha256(rejected).hexdigest(),
        },
        "shards": writer.shards,
    }
    for name, data in ((REJECTED_NAME, rejected), (MANIFEST_NAME, with_checksum(manifest))):
        write_file(result / name, data)
    if faults := verify(result):
        discard(result)
        raise KfoodError(f"the shards written for {job.out} are damaged when read back ({faults[0]})", "check the disk")
    publish(result, job.out)


def _shards_name(job: _Job, pictures: Sequence[Prepared]) -> str:
    """Return a name for the shards to write. Finished shards of this name have the same bytes, whoever wrote them."""
    digest = hashlib.sha256(f"{__version__} {job.source['fingerprint']}\n".encode())
    for p in pictures:
        places = [f"{place.offset} {place.num_bytes} {place.sha256} {place.perceptual_hash}" for place in p.places]
        digest.update(f"{p.file} {' '.join(places)}\n".encode())
    return digest.hexdigest()[:16]


def _chosen(job: _Job, pictures: Sequence[Prepared], classes: Sequence[DishClass]) -> dict[str, Any] | None:
    """Return which part of the source was chosen, and which classes have too few pictures after reading them all."""
    per_class, subset = job.options.per_class, job.options.subset
    if per_class is None:
        return None
    names = {*job.chosen_from, *(dish.name for dish in classes)}
    short = count_short(per_class, names, (picture.record.label for picture in pictures))
    return {"per_class": per_class, "subset": subset, "short": short}


def _describe_split(own: SourceSplit | None, groups: Sequence[int], splits: Sequence[str]) -> dict[str, Any] | None:
    """Return the source's own split and how it was used, or None if the source has none."""
    if own is None:
        return None
    groups_across, in_train = count_across(groups, splits)
    return {
        "given": own.given,
        "kept": own.is_kept,
        "outside": own.num_outside,
        "from_train": own.from_train,
        "groups_across": groups_across,
        "look_alike_in_train": in_train,
    }


def _gather(job: _Job, chunks: Sequence[Chunk], folder: Path) -> tuple[list[Prepared], list[Refusal]]:
    """Return the prepared samples and the refusals, each in order. Prepares a chunk again if its file is unusable."""
    pictures: list[Prepared] = []
    unusable: list[Refusal] = []
    for chunk in chunks:
        outcomes = load_chunk(chunk, folder)
        if outcomes is None:
            prepare_chunk(chunk, job.options.picture_settings(), folder)
            outcomes = load_chunk(chunk, folder)
            if outcomes is None:
                raise KfoodError(f"{folder / chunk.name} is damaged when read back", "check the disk")
        pictures += (outcome for outcome in outcomes if isinstance(outcome, Prepared))
        unusable += (outcome for outcome in outcomes if isinstance(outcome, Refusal))
    return pictures, unusable


def _count_boxes(pictures: Sequence[Prepared]) -> dict[str, int]:
    counts = Counter(place.cropped for picture in pictures for place in picture.places)
    return {"cropped": counts[True], "without_box": counts[None], "unusable_box": counts[False]}
