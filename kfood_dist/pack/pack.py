"""The command `kfood pack`: its arguments and its summary. The work is in `job.py`."""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kfood_dist.data.picture.decoding import HEIC_REMEDY, NEEDS_HEIC
from kfood_dist.data.picture.images import RESIZE_POLICIES
from kfood_dist.data.shards.manifest import REJECTED_NAME, SPLITS, Manifest
from kfood_dist.pack.job import Packed, pack
from kfood_dist.pack.options import PackOptions, parse_part
from kfood_dist.pack.refused import counted
from kfood_dist.pack.sources.ignored import how_to_read, list_counts
from kfood_dist.pack.split import parse_fractions
from kfood_dist.system.words import plural

# The reasons that refuse a complete archive: one such input may hold hundreds of pictures.
_WHOLE_ARCHIVES = ("unreadable_archive", "nested_archive")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `kfood pack`. The defaults are those of PackOptions."""
    default = PackOptions()
    parser.description = (
        "Pack pictures into WebDataset shards. It may be stopped at any time: the same command then continues."
    )
    add = parser.add_argument
    add(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a folder of dish folders, a zip of them (which may hold zips), or a list: a CSV of image_path,label or "
        "image_path,question,answer, or a JSONL file of image, question, answer",
    )
    add("out", type=Path, metavar="OUT", help="the folder to make; it appears when everything is packed and checked")
    add("--image-size", type=int, default=default.image_size, metavar="PX", help="side of the square (%(default)s)")
    add(
        "--resize",
        choices=RESIZE_POLICIES,
        default=default.resize,
        help="how to make a square: ignore the aspect ratio, pad with grey, or keep the centre (%(default)s)",
    )
    add("--quality", type=int, default=default.quality, help="JPEG quality, 1 to 100 (%(default)s)")
    add(
        "--min-side",
        type=int,
        default=default.min_side,
        metavar="PX",
        help="refuse pictures with a side shorter than this (%(default)s)",
    )
    add(
        "--crop-boxes",
        action="store_true",
        help="crop each picture to its box in crop_area.properties, if it has one",
    )
    add(
        "--split",
        metavar="A,B,C",
        help="shares of train, val, test (0.8,0.1,0.1; a source with train, val or test folders keeps its own split)",
    )
    add(
        "--seed",
        type=int,
        default=default.seed,
        help="seed of the subsets, the splits and the order of samples (%(default)s)",
    )
    add("--per-class", type=int, metavar="N", help="pack N pictures of each class (all)")
    add(
        "--subset",
        type=int,
        default=default.subset,
        metavar="K",
        help="with --per-class, pack the K-th subset; no two subsets share a picture (1)",
    )
    add(
        "--classes",
        type=Path,
        metavar="TSV",
        help="class list: category, name, aliases; other labels are refused",
    )
    add("--image-root", type=Path, metavar="DIR", help="where the paths of a list start (the list's folder)")
    add(
        "--encoding",
        metavar="NAME",
        help="encoding of a CSV, such as cp949 (found from its text; refused if that is not clear)",
    )
    add(
        "--max-rejected",
        type=float,
        default=default.max_rejected,
        metavar="SHARE",
        help="fail if a larger share of the inputs cannot be used (%(default)s)",
    )
    add("--shard-size", type=int, default=default.shard_size, metavar="N", help="samples per tar (%(default)s)")
    add("--workers", type=int, default=default.workers, metavar="N", help="worker processes (all cores: %(default)s)")
    add(
        "--part",
        default="1/1",
        metavar="K/N",
        help="run as one of several packers, as in a Slurm array: start with the K-th of N parts, then do what is left",
    )


def run(args: argparse.Namespace) -> int:
    """Pack, print a summary, and return the exit status 0."""
    part, parts = parse_part(args.part)
    options = PackOptions(
        image_size=args.image_size,
        resize=args.resize,
        quality=args.quality,
        min_side=args.min_side,
        crop_boxes=args.crop_boxes,
        fractions=None if args.split is None else parse_fractions(args.split),
        seed=args.seed,
        per_class=args.per_class,
        subset=args.subset,
        shard_size=args.shard_size,
        classes=args.classes,
        image_root=args.image_root,
        encoding=args.encoding,
        max_rejected=args.max_rejected,
        workers=args.workers,
        part=part,
        parts=parts,
    )
    started = time.perf_counter()
    packed = pack(args.source, args.out, options)
    print("\n".join(_summary(packed, args.source, args.out, options, time.perf_counter() - started)))
    return 0


def _summary(packed: Packed, source: Path, out: Path, options: PackOptions, seconds: float) -> Iterator[str]:
    if packed.manifest is None:
        yield f"part     {options.part} of {options.parts}: all parts ready; another packer is putting {out} together"
        return
    if packed.reused:
        how = "another packer finished it" if packed.by_another else "already complete, made"
        yield f"reused   {out}: {how} from this source with these options"
    yield from _describe(packed.manifest, source, out)
    num_packed = sum(shard.samples for shard in packed.manifest.shards)
    pace = "" if packed.reused else f", {seconds:.1f} s, {num_packed / seconds:,.0f} samples/s"
    num_bytes = sum(shard.bytes for shard in packed.manifest.shards)
    yield f"holds    {num_bytes:,} bytes in {plural(len(packed.manifest.shards), 'shard')}{pace}: {out}"


def _describe(manifest: Manifest, source: Path, out: Path) -> Iterator[str]:
    raw = manifest.raw
    counts = {split: raw["splits"][split]["samples"] for split in SPLITS}
    groups = sum(raw["splits"][split]["groups"] for split in SPLITS)
    by_split = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    samples = plural(sum(counts.values()), "sample")
    classes = f" of {plural(len(manifest.classes), 'class', 'classes')}" if manifest.classes else ""
    yield f"packed   {samples}{classes}: {by_split}"
    yield from _describe_split(raw.get("source_split"))
    leaked = raw["random_split_would_leak"]
    measured = " and ".join(plural(leaked[split], f"{split} picture") for split in ("val", "test"))
    if manifest.groups_across == 0:
        yield (
            f"groups   {groups:,}. Near-duplicates share a group, and each group is in one split. A random split "
            f"would put near-duplicates of {measured} into train."
        )
    if raw["chosen"] and (short := raw["chosen"]["short"]):
        some = ", ".join(f"{name} {count}" for name, count in list(short.items())[:5])
        more = ", …" if len(short) > 5 else ""
        fewer = f"{plural(len(short), 'class has', 'classes have')} fewer than {raw['chosen']['per_class']}"
        yield f"short    {fewer}: {some}{more}"
    if raw["crop_boxes"]:
        lists = raw["source"]["crop_lists"]
        num_ignored = lists["lines_malformed"] + lists["lines_unmatched"]
        yield f"cropped  {counted(raw['crop_boxes'])}; {plural(num_ignored, 'line')} of the lists ignored"
    refused = raw["rejected"]
    reasons = counted(refused["by_reason"])
    where = f": {reasons}; all named in {out / REJECTED_NAME}" if reasons else ""
    yield f"refused  {refused['count']:,} ({refused['share']:.2%}){where}"
    # A data set that an earlier version packed has no such count.
    if ignored := raw["source"].get("passed_by"):
        yield from _describe_ignored(ignored, source)
    if whole := sum(refused["by_reason"].get(reason, 0) for reason in _WHOLE_ARCHIVES):
        archives = plural(whole, "of these is an archive", "of these are archives")
        yield f"WARNING  {archives}, which may hold any number of pictures: see {REJECTED_NAME}"
    if heic := refused["by_reason"].get(NEEDS_HEIC):
        yield f"WARNING  {heic:,} HEIC pictures are refused: {HEIC_REMEDY}, remove {out} and pack again"


def _describe_split(own: dict[str, Any] | None) -> Iterator[str]:
    """Yield the lines that say how the source's own split was used, or nothing if it has none."""
    if own is None:
        return
    given, from_train = _listed(own["given"]), _listed(own["from_train"])
    if not own["kept"]:
        yield f"split    assigned by --split; the source's own split ({given}) is not kept"
        return
    lacking = [split for split in SPLITS if split not in own["given"]]
    taken = f"; it has no {from_train}: taken from its train by the usual share" if from_train else ""
    empty = f"; it has no {_listed(lacking)}: empty" if lacking and not from_train else ""
    yield f"split    the source's own: {given} kept{taken}{empty}; --split replaces this split"
    if own["outside"]:
        yield f"WARNING  {own['outside']:,} pictures are in no split of the source and are refused"
    if own["groups_across"]:
        in_train = own["look_alike_in_train"]
        yield (
            f"WARNING  {own['groups_across']:,} groups of near-duplicates are in several splits of the source: "
            f"{in_train['val']:,} pictures of val and {in_train['test']:,} of test have one in train. Nothing was moved"
        )


def _listed(names: Sequence[str]) -> str:
    """Return names as text, such as `train, val and test`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _describe_ignored(ignored: dict[str, Any], source: Path) -> Iterator[str]:
    """Yield the lines that say what the source holds besides pictures, and how to read files that may hold pictures."""
    if by_suffix := ignored["by_suffix"]:
        yield f"ignored  {sum(by_suffix.values()):,} files that are not pictures: {list_counts(by_suffix)}"
    if made := ignored["machine_made"]:
        yield f"ignored  {sum(made.values()):,} hidden files or files that a machine made: {list_counts(made)}"
    for kind, found in ignored["containers"].items():
        more = f" and {found['count'] - 1:,} more" if found["count"] > 1 else ""
        yield f"WARNING  {found['first']}{more}: not read; {how_to_read(kind, str(source / found['first']))}"
