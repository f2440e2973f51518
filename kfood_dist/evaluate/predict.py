"""`kfood predict`: the dish on single pictures, as one JSON line each.

    IMAGE … ──► the packer's own resizing ──► the training prompt ──► greedy answer + beam search ──► JSON lines

Always holds: a picture is shown to the model as in training, by the same functions and with the adapter's settings. No
name is less likely than one of its alternatives. A picture that cannot be read is reported in its line, and does not
stop the others. Without alternatives, the name is the one that `kfood eval` would score.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfood_dist.data.batch.template import SampleRefused, Template
from kfood_dist.data.picture.images import ImageRejected, prepare_jpeg
from kfood_dist.data.plan.plan import MicroBatch
from kfood_dist.data.shards.sample import Sample
from kfood_dist.data.task.base import Task
from kfood_dist.data.task.dish import clean
from kfood_dist.data.task.table import TASKS, build_task
from kfood_dist.errors import RecipeError, ShardError
from kfood_dist.evaluate.settings import Settings, add_model_arguments, resolve_settings
from kfood_dist.model.files import require_base
from kfood_dist.model.processor import build_template
from kfood_dist.model.vision import blank
from kfood_dist.system.processes import quiet_libraries
from kfood_dist.system.words import plural
from kfood_dist.system.world import World

if TYPE_CHECKING:
    from kfood_dist.data.batch.collate import StreamingCollator
    from kfood_dist.evaluate.generate import Answer, Answerer

DEFAULT_RESIZE = "squash"  # the packer's default, for adapters that do not define it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `kfood predict`."""
    parser.description = (
        "Name the dish on each picture, as one JSON line: image, the likeliest name found, its confidence (the "
        "probability of all answers with that name) and the alternatives, likeliest first. A picture that cannot be "
        "read gets a line with an error. The exit status is then 1."
    )
    parser.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="picture files: JPEG, PNG, GIF, BMP, WebP"
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--question", metavar="TEXT", help="the question to ask about each picture by itself, if the task is question"
    )
    parser.add_argument(
        "--alternatives", type=_count, default=3, metavar="N", help="how many other names to give (default: 3)"
    )


def _count(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def run(args: argparse.Namespace) -> int:
    """Answer every picture that can be read. Returns 1 if one cannot be read."""
    settings, recipe_eval = resolve_settings(args)
    from kfood_dist.data.batch.collate import StreamingCollator
    from kfood_dist.evaluate.generate import load_answerer, pick_device

    quiet_libraries()
    require_base(args.model)
    template = build_template(args.model, settings, args.adapter)
    task = build_task(settings.task, settings.system, settings.prompt)
    columns = sample_columns(settings.task, args.question, args.adapter)
    require_question_fits(template, task, columns, settings.image_size)
    pictures = [read_picture(path, settings) for path in args.images]
    answerer = None
    if any(isinstance(picture, bytes) for picture in pictures):
        device = pick_device(World())
        answerer = load_answerer(settings, template, args.model, args.adapter, device, recipe_eval.max_new_tokens)
    for path, picture in zip(args.images, pictures, strict=True):
        line: dict[str, Any] = {"image": str(path)}
        if isinstance(picture, bytes) and answerer:
            collator = StreamingCollator(OnePicture(picture, columns), template, task, for_generation=True)
            line |= name_dish(answerer, collator, args.alternatives)
        else:
            line["error"] = str(picture)
        print(json_line(line, sys.stdout.encoding), flush=True)
    failed = sum(not isinstance(picture, bytes) for picture in pictures)
    if failed:
        print(f"{failed} of {plural(len(pictures), 'picture')} cannot be read", file=sys.stderr)
    return 1 if failed else 0


def sample_columns(task: str, question: str | None, adapter: Path | None) -> dict[str, str]:
    """Return what a sample has besides its picture. Raises RecipeError if the question is missing, or is not used."""
    asks = "question" in TASKS[task].columns
    if asks and not (question or "").strip():
        raise RecipeError(f"the task is {task}, but no question is given", "ask one with --question TEXT")
    if question and not asks:
        raise RecipeError(
            f"--question is given, but the task {task} has its own question",
            "remove it, or " + ("name an adapter of the task question" if adapter else "--set data.task=question"),
        )
    return {"question": question} if question else {}


def require_question_fits(template: Template, task: Task, columns: dict[str, str], image_size: int) -> None:
    """Raise RecipeError if the model cannot be asked the question. Training would skip a sample with it."""
    try:
        template.encode(task.messages(columns, 1), [template.pictures.encode(blank(image_size)).ids], None)
    except SampleRefused as refused:
        raise RecipeError(f"the question cannot be asked ({refused})", "use other words") from None


def json_line(value: dict[str, Any], encoding: str | None) -> str:
    """Return one line of JSON, with JSON's own escapes if `encoding` lacks one of its characters."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def read_picture(path: Path, settings: Settings) -> bytes | str:
    """Return the picture as the packer would store it, as JPEG bytes, or as text why it cannot be used."""
    try:
        return prepare_jpeg(path.read_bytes(), settings.image_size, settings.resize or DEFAULT_RESIZE)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ImageRejected as error:
        return str(error)


class OnePicture:
    """A picture in place of the shards, so that it goes through the collator that training uses."""

    def __init__(self, jpeg: bytes, columns: dict[str, str]):
        self.jpeg = jpeg
        self.columns = columns

    def __len__(self) -> int:
        return 1

    def key(self, i: int) -> str:
        return "picture"

    def read_many(self, ids: Sequence[int]) -> list[Sample | ShardError]:
        """Return the picture once for each id."""
        return [Sample((self.jpeg,), self.columns) for _ in ids]


def name_dish(answerer: "Answerer", collator: "StreamingCollator", num_alternatives: int) -> dict[str, Any]:
    """Return `name`, `confidence` and `alternatives` of one collated picture."""
    batch = collator[MicroBatch(step=0, micro_step=0, ids=(0,), filler=0)]
    greedy = answerer.answer(batch)[0]
    found = answerer.alternatives(batch, num_alternatives + 1) if num_alternatives else []
    likeliest, *others = rank_names(greedy, found)
    return {**likeliest, "alternatives": others[:num_alternatives]}


def rank_names(greedy: "Answer", found: Sequence["Answer"]) -> list[dict[str, Any]]:
    """Return each name once with its `confidence`, likeliest first: of `greedy`, and of those a beam search `found`.

    The probabilities of texts with the same name are added. If the greedy answer is among those found, it counts once.
    An empty name is returned only if it is the likeliest.
    """
    of_text: dict[str, float] = {}
    for answer in found:
        of_text[answer.text] = of_text.get(answer.text, 0.0) + answer.confidence
    of_text[greedy.text] = max(of_text.get(greedy.text, 0.0), greedy.confidence)
    total: dict[str, float] = {}
    for text, probability in of_text.items():
        total[clean(text)] = total.get(clean(text), 0.0) + probability
    first, *others = sorted(total.items(), key=lambda item: (-item[1], item[0]))
    named = [first, *((name, probability) for name, probability in others if name)]
    return [{"name": name, "confidence": float(f"{min(1.0, probability):.6g}")} for name, probability in named]
