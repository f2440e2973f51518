"""`kfood predict`: the dish on single pictures, one JSON line each.

    IMAGE … ──► the packer's own resizing ──► the training prompt ──► greedy answer + beam search ──► JSON lines

Always holds: a picture is seen as training saw it, through the same functions and the adapter's settings; the name is
the one `kfood eval` would score; a picture that cannot be read is told of in its line and stops no other.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfood_dist.data.images import ImageRejected, prepare_jpeg
from kfood_dist.data.labels import normalise
from kfood_dist.data.plan import MicroBatch
from kfood_dist.evaluate.fit import build_template
from kfood_dist.evaluate.settings import Settings, add_model_arguments, resolve_settings
from kfood_dist.runtime import World, quiet_libraries
from kfood_dist.words import plural

if TYPE_CHECKING:
    from kfood_dist.data.collate import StreamingCollator
    from kfood_dist.evaluate.generate import Answer, Answerer

DEFAULT_RESIZE = "squash"  # the packer's default, where neither an adapter nor shards say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `kfood predict`."""
    parser.description = (
        "Name the dish on each picture, as one JSON line: image, name, confidence (the probability of exactly that "
        "answer) and the alternatives. A picture that cannot be read gets a line with an error, and exit status 1."
    )
    parser.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="picture files: JPEG, PNG, GIF, BMP, WebP"
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--alternatives", type=_count, default=3, metavar="N", help="how many other names to give (default: 3)"
    )


def _count(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def run(args: argparse.Namespace) -> int:
    """Answer every picture that can be read; 1 if one cannot."""
    settings, recipe_eval = resolve_settings(args)
    from kfood_dist.data.collate import StreamingCollator
    from kfood_dist.evaluate.generate import load_answerer, pick_device

    quiet_libraries()
    template = build_template(settings, args.model, args.adapter)
    pictures = [read_picture(path, settings) for path in args.images]
    answerer = None
    if any(isinstance(picture, bytes) for picture in pictures):
        device = pick_device(World())
        answerer = load_answerer(settings, template, args.model, args.adapter, device, recipe_eval.max_new_tokens)
    for path, picture in zip(args.images, pictures, strict=True):
        line: dict[str, Any] = {"image": str(path)}
        if isinstance(picture, bytes) and answerer:
            collator = StreamingCollator(OnePicture(picture), template, for_generation=True)  # type: ignore[arg-type]
            line |= name_dish(answerer, collator, args.alternatives)
        else:
            line["error"] = str(picture)
        print(json.dumps(line, ensure_ascii=False), flush=True)
    failed = sum(not isinstance(picture, bytes) for picture in pictures)
    if failed:
        print(f"{failed} of {plural(len(pictures), 'picture')} cannot be read", file=sys.stderr)
    return 1 if failed else 0


def read_picture(path: Path, settings: Settings) -> bytes | str:
    """The picture as the packer would store it, as JPEG bytes; or, as text, why it cannot be used."""
    try:
        return prepare_jpeg(path.read_bytes(), settings.image_size, settings.resize or DEFAULT_RESIZE)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ImageRejected as error:
        return str(error)


class OnePicture:
    """A picture in place of a shard, so that it goes through the collator that training uses."""

    def __init__(self, jpeg: bytes):
        self.jpeg = jpeg

    def read_many(self, ids: Sequence[int]) -> list[bytes]:
        """The JPEG bytes, for each id."""
        return [self.jpeg for _ in ids]


def name_dish(answerer: "Answerer", collator: "StreamingCollator", num_alternatives: int) -> dict[str, Any]:
    """`name`, `confidence` and `alternatives` of one collated picture."""
    batch = collator[MicroBatch(step=0, micro_step=0, ids=(0,), filler=0)]
    answer = answerer.answer(batch)[0]
    name = normalise(answer.text)
    others = answerer.alternatives(batch, num_alternatives + 1) if num_alternatives else []
    return {
        "name": name,
        "confidence": answer.confidence,
        "alternatives": rank_others(others, name)[:num_alternatives],
    }


def rank_others(answers: Sequence["Answer"], name: str) -> list[dict[str, Any]]:
    """Each other name once, likeliest first; texts that normalise to one name add up their probabilities."""
    total: dict[str, float] = {}
    for answer in answers:
        total[normalise(answer.text)] = total.get(normalise(answer.text), 0.0) + answer.confidence
    ranked = sorted(total.items(), key=lambda item: (-item[1], item[0]))
    return [{"name": n, "confidence": float(f"{p:.6g}")} for n, p in ranked if n and n != name]
