"""`kfood pack`: its words, and what it says when it is done. The work is in `job.py`."""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from kfood_dist.data.images import RESIZE_POLICIES
from kfood_dist.data.manifest import REJECTED_NAME, SPLITS, Manifest
from kfood_dist.data.packing.job import Packed, counted, pack
from kfood_dist.data.packing.options import PackOptions, parse_part
from kfood_dist.data.packing.split import parse_fractions
from kfood_dist.words import plural

# Inputs that stand for many: one such line may hide a hundred pictures.
_WHOLE_ARCHIVES = ("unreadable_archive", "nested_archive", "extracted")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of `kfood pack`; the defaults are those of PackOptions."""
    default = PackOptions()
    parser.description = (
        "Pack pictures into WebDataset shards. Stopped at any moment and started again with the same words, it goes on."
    )
    add = parser.add_argument
    add(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a folder of dish folders, a zip of such (zips inside it too), or a CSV of image_path,label",
    )
    add("out", type=Path, metavar="OUT", help="the folder to make; it appears once all is packed and checked")
    add("--image-size", type=int, default=default.image_size, metavar="PX", help="side of the square (%(default)s)")
    add(
        "--resize",
        choices=RESIZE_POLICIES,
        default=default.resize,
        help="to the square: ignore the aspect ratio, pad with grey, or keep the centre (%(default)s)",
    )
    add("--quality", type=int, default=default.quality, help="JPEG quality, 1 to 100 (%(default)s)")
    add(
        "--min-side",
        type=int,
        default=default.min_side,
        metavar="PX",
        help="refuse smaller ones (%(default)s)",
    )
    add(
        "--crop-boxes",
        action="store_true",
        help="cut pictures to their box in crop_area.properties, where there is one",
    )
    add("--split", default="0.8,0.1,0.1", metavar="A,B,C", help="shares of train, val, test (%(default)s)")
    add("--seed", type=int, default=default.seed, help="of subsets, splits and the order of samples (%(default)s)")
    add("--per-class", type=int, metavar="N", help="so many pictures of each class (all)")
    add(
        "--subset",
        type=int,
        default=default.subset,
        metavar="K",
        help="the K-th such choice; no two share a picture (1)",
    )
    add(
        "--classes",
        type=Path,
        metavar="TSV",
        help="class list: category, name, aliases; refuses other labels",
    )
    add("--image-root", type=Path, metavar="DIR", help="where a CSV's paths start (the CSV's folder)")
    add(
        "--max-rejected",
        type=float,
        default=default.max_rejected,
        metavar="SHARE",
        help="fail when more of the inputs than this is unusable (%(default)s)",
    )
    add("--shard-size", type=int, default=default.shard_size, metavar="N", help="samples per tar (%(default)s)")
    add("--workers", type=int, default=default.workers, metavar="N", help="processes (all cores: %(default)s)")
    add(
        "--part",
        default="1/1",
        metavar="K/N",
        help="do the K-th of N parts, as a Slurm array's task does; the last to finish puts them together",
    )


def run(args: argparse.Namespace) -> int:
    """Pack, and print what came out; exit status 0."""
    part, parts = parse_part(args.part)
    options = PackOptions(
        image_size=args.image_size,
        resize=args.resize,
        quality=args.quality,
        min_side=args.min_side,
        crop_boxes=args.crop_boxes,
        fractions=parse_fractions(args.split),
        seed=args.seed,
        per_class=args.per_class,
        subset=args.subset,
        shard_size=args.shard_size,
        classes=args.classes,
        image_root=args.image_root,
        max_rejected=args.max_rejected,
        workers=args.workers,
        part=part,
        parts=parts,
    )
    started = time.perf_counter()
    packed = pack(args.source, args.out, options)
    print("\n".join(_summary(packed, args.out, options, time.perf_counter() - started)))
    return 0


def _summary(packed: Packed, out: Path, options: PackOptions, seconds: float) -> Iterator[str]:
    if packed.manifest is None:
        yield f"part     {options.part} of {options.parts} is prepared; " + (
            f"{plural(packed.missing_chunks, 'chunk of other parts is', 'chunks of other parts are')} missing yet"
            if packed.missing_chunks
            else f"another packer is putting {out} together"
        )
        return
    if packed.reused:
        how = "another packer finished it" if packed.by_another else "complete, and made"
        yield f"reused   {out}: {how}, from this source with these options"
    yield from _describe(packed.manifest, out)
    num_packed = sum(shard.samples for shard in packed.manifest.shards)
    pace = "" if packed.reused else f", {seconds:.1f} s, {num_packed / seconds:,.0f} pictures/s"
    num_bytes = sum(shard.bytes for shard in packed.manifest.shards)
    yield f"holds    {num_bytes:,} bytes in {plural(len(packed.manifest.shards), 'shard')}{pace}: {out}"


def _describe(manifest: Manifest, out: Path) -> Iterator[str]:
    raw = manifest.raw
    counts = {split: raw["splits"][split]["samples"] for split in SPLITS}
    groups = sum(raw["splits"][split]["groups"] for split in SPLITS)
    by_split = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    classes = plural(len(manifest.classes), "class", "classes")
    yield f"packed   {plural(sum(counts.values()), 'picture')} of {classes}: {by_split}"
    leaked = raw["random_split_would_leak"]
    measured = " and ".join(plural(leaked[split], f"{split} picture") for split in ("val", "test"))
    yield (
        f"groups   {groups:,}. Near-duplicates share a group, and each group lies in one split. A random split would "
        f"put near-duplicates of {measured} into train."
    )
    if raw["chosen"] and (short := raw["chosen"]["short"]):
        some = ", ".join(f"{name} {count}" for name, count in list(short.items())[:5])
        more = ", …" if len(short) > 5 else ""
        fewer = f"{plural(len(short), 'class has', 'classes have')} fewer than {raw['chosen']['per_class']}"
        yield f"short    {fewer}: {some}{more}"
    if raw["crop_boxes"]:
        lists = raw["source"]["crop_lists"]
        ignored = lists["lines_malformed"] + lists["lines_unmatched"]
        yield f"cropped  {counted(raw['crop_boxes'])}; {plural(ignored, 'line')} of the lists ignored"
    refused = raw["rejected"]
    reasons = counted(refused["by_reason"])
    where = f": {reasons}; all named in {out / REJECTED_NAME}" if reasons else ""
    yield f"refused  {refused['count']:,} ({refused['share']:.2%}){where}"
    if whole := sum(refused["by_reason"].get(reason, 0) for reason in _WHOLE_ARCHIVES):
        archives = plural(whole, "of these is a whole archive", "of these are whole archives")
        yield f"WARNING  {archives}, each with any number of pictures: see {REJECTED_NAME}"
