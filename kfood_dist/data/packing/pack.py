"""`kfood pack`: pictures in folders or a CSV become shards, an index beside each, and one manifest.

    scan ──► prepare (parallel, spooled) ──► place (classes, splits, order) ──► tars + indexes ──► manifest
      └──────────────┴──────────────┴──► rejected.csv: every input left out, and why                  │
                                                     OUT appears in one rename ◄── verify ◄───────────┘

Always holds: the same source, options and seed give the same bytes, whatever the number of workers; OUT is
whole or untouched; what grows with the source in memory are names and numbers, never pictures.
"""

import argparse
import csv
import hashlib
import io
import os
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from kfood_dist.data.images import RESIZE_POLICIES
from kfood_dist.data.labels import DishClass, load_classes
from kfood_dist.data.manifest import (
    FORMAT,
    MANIFEST_NAME,
    REJECTED_NAME,
    SPLITS,
    VERSION,
    Manifest,
    load_manifest,
    seal,
)
from kfood_dist.data.packing.options import PackOptions, fingerprint
from kfood_dist.data.packing.place import classes_of, part_ambiguous, place
from kfood_dist.data.packing.prepare import Refusal, prepare_all
from kfood_dist.data.packing.sources import Record, scan
from kfood_dist.data.packing.split import parse_fractions
from kfood_dist.data.packing.workspace import partial_folder, publish
from kfood_dist.data.packing.write import ShardWriter
from kfood_dist.data.shards import open_split
from kfood_dist.data.tars import write_file
from kfood_dist.data.verify import verify
from kfood_dist.errors import KfoodError, ShardError, SourceError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of `kfood pack`; the defaults are those of PackOptions."""
    default = PackOptions()
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="a folder of dish folders, or a CSV of image_path,label")
    add("out", type=Path, metavar="OUT", help="the folder to make; it appears once all is packed and checked")
    add(
        "--image-size",
        type=int,
        default=default.image_size,
        metavar="PX",
        help="side of the square (%(default)s)",
    )
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
    add("--split", default="0.8,0.1,0.1", metavar="A,B,C", help="shares of train, val, test (%(default)s)")
    add("--seed", type=int, default=default.seed, help="of the splits and the order of samples (%(default)s)")
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
    add(
        "--shard-size",
        type=int,
        default=default.shard_size,
        metavar="N",
        help="samples per tar (%(default)s)",
    )
    add("--workers", type=int, default=default.workers, metavar="N", help="processes (all cores: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Pack, and print what came out; exit status 0."""
    options = PackOptions(
        image_size=args.image_size,
        resize=args.resize,
        quality=args.quality,
        min_side=args.min_side,
        fractions=parse_fractions(args.split),
        seed=args.seed,
        shard_size=args.shard_size,
        classes=args.classes,
        image_root=args.image_root,
        max_rejected=args.max_rejected,
        workers=args.workers,
    )
    started = time.perf_counter()
    manifest, reused = pack(args.source, args.out, options)
    seconds = time.perf_counter() - started
    print("\n".join(_summary(manifest, args.out, None if reused else seconds)))
    return 0


def _summary(manifest: Manifest, out: Path, seconds: float | None) -> Iterator[str]:
    if seconds is None:
        yield f"reused   {out}: complete, and made from this source with these options"
    counts = {split: manifest.raw["splits"][split]["samples"] for split in SPLITS}
    num_packed = sum(counts.values())
    by_split = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    yield f"packed   {num_packed:,} pictures of {len(manifest.classes)} classes: {by_split}"
    refused = manifest.raw["rejected"]
    reasons = _counted(refused["by_reason"])
    where = f": {reasons}; all named in {out / REJECTED_NAME}" if reasons else ""
    yield f"refused  {refused['count']:,} ({refused['share']:.2%}){where}"
    pace = "" if seconds is None else f", {seconds:.1f} s, {num_packed / seconds:,.0f} pictures/s"
    num_bytes = sum(shard.bytes for shard in manifest.shards)
    yield f"holds    {num_bytes:,} bytes in {len(manifest.shards)} shards{pace}: {out}"


def pack(source: Path, out: Path, options: PackOptions) -> tuple[Manifest, bool]:
    """Pack `source` into the new folder `out`; returns its manifest, and whether it was there already.

    Raises SourceError when an option or the source cannot be used, too much is refused (the list then lies in
    `OUT.rejected.csv`) or `out` holds anything else; KfoodError when the disk is full.
    """
    options.check()
    out = Path(os.path.realpath(out))
    listed = None if options.classes is None else load_classes(options.classes)
    records = scan(source, options.image_root, listed)
    kind = "folder" if source.is_dir() else "csv"
    origin = {
        "kind": kind,
        "name": unicodedata.normalize("NFC", source.resolve().name),
        "fingerprint": fingerprint(kind, records, listed, options),
    }
    existing = _existing(out, origin["fingerprint"], options.max_rejected)
    if existing is not None:
        return existing, True
    with partial_folder(out) as partial:
        _fill(partial, out, records, listed, origin, options)
        if faults := verify(partial):
            raise KfoodError(f"what was written to {out} reads back damaged ({faults[0]})", "check that disk")
        publish(partial, out)
    _kept_list(out).unlink(missing_ok=True)
    return load_manifest(out), False


def _existing(out: Path, identity: str, max_rejected: float) -> Manifest | None:
    """The manifest of `out` if it is whole and the data set wanted, None if there is nothing yet."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    another = "choose another OUT, or remove this one first"
    try:
        manifest = load_manifest(out)
    except ShardError as error:
        raise SourceError(f"{out} is there already and is no packed data set ({error.what})", another) from None
    origin = manifest.raw.get("source")
    if not isinstance(origin, dict) or origin.get("fingerprint") != identity:
        raise SourceError(f"{out} holds another data set: of another source, or other options", another)
    for split in manifest.splits:
        open_split(out, split).require_files()
    if (share := manifest.raw["rejected"]["share"]) > max_rejected:
        raise SourceError(
            f"{out} was packed with {share:.1%} of its inputs refused, above --max-rejected {max_rejected}",
            f"see {out / REJECTED_NAME}; mend the source, or raise --max-rejected",
        )
    return manifest


def _fill(
    partial: Path,
    out: Path,
    records: Sequence[Record],
    listed: Sequence[DishClass] | None,
    origin: Mapping[str, str],
    options: PackOptions,
) -> None:
    """Write everything that `out` will hold into `partial`."""
    refused = [Refusal(r.source, r.label, r.problem, r.detail) for r in records if r.problem is not None]
    _require_enough(refused, len(records), out, options.max_rejected)
    with open(partial / "spool", "w+b") as spool:
        sound = [record for record in records if record.problem is None]
        pictures, unusable = prepare_all(sound, spool, options.picture_settings(), options.workers)
        spool.flush()
        pictures, ambiguous = part_ambiguous(pictures)
        refused = [*refused, *unusable, *ambiguous]
        _require_enough(refused, len(records), out, options.max_rejected)
        classes = classes_of(pictures) if listed is None else listed
        writer = ShardWriter(partial, spool.fileno(), classes, options.image_size, options.shard_size)
        for split, samples in place(pictures, classes, options.fractions, options.seed).items():
            writer.write(split, samples)
    (partial / "spool").unlink()
    rejected_csv = _rejected_csv(refused)
    write_file(partial / REJECTED_NAME, rejected_csv)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "image_size": options.image_size,
        "resize": options.resize,
        "jpeg_quality": options.quality,
        "seed": options.seed,
        "source": origin,
        "classes": [{"name": c.name, "category": c.category, "aliases": c.aliases} for c in classes],
        "splits": writer.splits,
        "rejected": {
            "count": len(refused),
            "share": round(len(refused) / len(records), 6),
            "by_reason": _by_reason(refused),
            "sha256": hashlib.sha256(rejected_csv).hexdigest(),
        },
        "shards": writer.shards,
    }
    write_file(partial / MANIFEST_NAME, seal(manifest))


def _require_enough(refused: Sequence[Refusal], num_inputs: int, out: Path, max_rejected: float) -> None:
    """Raise SourceError, leaving the list beside `out`, when nothing or too little remains."""
    share = len(refused) / num_inputs
    if len(refused) < num_inputs and share <= max_rejected:
        return
    reasons = _by_reason(refused)
    kept = _kept_list(out)
    kept.write_bytes(_rejected_csv(refused))
    hint = " name the folder where the paths start with --image-root;" if next(iter(reasons)) == "missing" else ""
    limit = "" if len(refused) == num_inputs else f", more than --max-rejected {max_rejected}"
    raise SourceError(
        f"{len(refused):,} of {num_inputs:,} inputs ({share:.1%}) cannot be used{limit}: {_counted(reasons)}",
        f"each is named in {kept};{hint} mend the source, or raise --max-rejected",
    )


def _kept_list(out: Path) -> Path:
    return out.with_name(f"{out.name}.{REJECTED_NAME}")


def _by_reason(refused: Sequence[Refusal]) -> dict[str, int]:
    counts = Counter(refusal.reason for refusal in refused)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _counted(by_reason: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in by_reason.items())


def _rejected_csv(refused: Sequence[Refusal]) -> bytes:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["source", "label", "reason", "detail"])
    rows.writerows([r.source, r.label, r.reason, r.detail] for r in sorted(refused))
    return text.getvalue().encode("utf-8")
