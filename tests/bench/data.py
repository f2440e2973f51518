"""Measure how fast pictures are loaded and packed and a run resumes, beside common alternatives. One core, one run.

    python tests/bench/data.py [--rounds 5] [--out tests/bench/data.md]

Every contender reads the same packed pictures of the practice set (launch/quickstart.sh makes it) and returns batches
of 16 samples that are ready for the model: pixels and token ids. The rounds of all contenders are interleaved, because
the load of a machine always varies. The table has medians and the ratios of one run. A contender that is not installed
is listed with the reason.
"""

import argparse
import io
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BATCH = 16
PHOTO_SIZES = ((640, 480), (1600, 1200))
# The package keeps the resize weights of a size for the next picture of that size. This case has no such picture.
NO_SIZE_TWICE = "kfood_dist where no two sizes are alike"
PACKAGES = ("torch", "transformers", "webdataset", "pillow", "simplejpeg", "numpy", "mosaicml-streaming", "litdata")
PROMPT = "이 음식의 이름은 무엇인가요? 음식 이름만 답하세요."

Contender = Callable[[], Iterator[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=Path, default=ROOT / "shards/practice")
    parser.add_argument("--model", default=str(ROOT / "data/practice/model"))
    parser.add_argument("--photos", type=Path, default=ROOT / "data/practice/images", help="pictures to pack")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="duration of each contender's round")
    parser.add_argument("--out", type=Path, help="write the tables to this file and the figures to a JSON file beside")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        contenders, absent = loaders(args.shards, args.model, Path(folder))
        loading = compare(contenders, args.rounds, args.seconds)
    packing = {size: compare(packers(args.photos, size), args.rounds, args.seconds) for size in PHOTO_SIZES}
    quality = {size: fidelity(args.photos, size) for size in PHOTO_SIZES}
    sys.path.insert(0, str(Path(__file__).parent))
    resumed = import_module("hundred_million").measure(args.shards, args.model)
    text = report(loading, absent, packing, quality, resumed) + about_photographs(args.photos)
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
        figures = {"loading": loading, "packing": str(packing), "psnr": str(quality), "resume": resumed, **machine()}
        args.out.with_suffix(".json").write_text(json.dumps(figures, indent=1, ensure_ascii=False), encoding="utf-8")


def compare(contenders: dict[str, Contender], rounds: int, seconds: float) -> dict[str, float]:
    """Return each contender's pictures per second, the median of its rounds.

    Contenders take turns, and each has its own process.
    """
    context = multiprocessing.get_context("fork")
    pipes = {name: context.Pipe() for name in contenders}
    for name, make in contenders.items():
        context.Process(target=answer_rounds, args=(pipes[name][1], make, seconds), daemon=True).start()
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for pipe, _ in pipes.values():
        pipe.recv()  # files are open and caches are filled
    for _ in range(rounds):
        for name, (pipe, _) in pipes.items():
            pipe.send("go")
            rates[name].append(pipe.recv())
    for pipe, _ in pipes.values():
        pipe.send(None)
    return {name: statistics.median(values) for name, values in rates.items()}


def answer_rounds(pipe: Any, make: Contender, seconds: float) -> None:
    """Run one round for each word that arrives on the pipe, and send back pictures per second."""
    batches = endless(make)
    next(batches)
    pipe.send("ready")
    while pipe.recv():
        began, pictures = time.perf_counter(), 0
        while (spent := time.perf_counter() - began) < seconds:
            pictures += next(batches)
        pipe.send(pictures / spent)


def endless(make: Contender) -> Iterator[int]:
    while True:
        yield from make()


# --- loading


def loaders(shards: Path, model: str, scratch: Path) -> tuple[dict[str, Contender], dict[str, str]]:
    """Return the contenders that can run, and for each of the others the reason why it cannot."""
    from transformers import AutoImageProcessor, AutoTokenizer

    from kfood_dist.data.batch.collate import StreamingCollator
    from kfood_dist.data.batch.loader import stream
    from kfood_dist.data.batch.template import Template
    from kfood_dist.data.picture.images import decode_rgb
    from kfood_dist.data.plan.plan import Plan
    from kfood_dist.data.plan.sampling import build_order
    from kfood_dist.data.shards.reader import open_split
    from kfood_dist.data.task.dish import DishTask
    from kfood_dist.model.base import load_config
    from kfood_dist.model.processor import load_tokenizer
    from kfood_dist.model.vision import load_pictures
    from kfood_dist.system.processes import keep_freed_memory

    split = open_split(shards, "train")
    size = split.manifest.image_size
    template = Template(load_tokenizer(model), load_pictures(model, load_config(model), size), 1536)
    collator = StreamingCollator(split, template, DishTask("", PROMPT, split.classes))
    plan = Plan(build_order([len(split)], [1.0]), 0, 1, BATCH, 1)
    samples = [split.read(i) for i in range(len(split))]
    jpegs = [sample.pictures[0] for sample in samples]
    names = [sample.columns["label"] for sample in samples]
    processor, tokenizer = AutoImageProcessor.from_pretrained(model), AutoTokenizer.from_pretrained(model)

    def ours() -> Iterator[int]:
        for batch in stream(collator, plan.micro_batches(0, 0, plan.steps_per_epoch), num_workers=0):
            yield len(batch.ids)

    def bare(decode: Callable[[bytes], Any]) -> Contender:
        def run() -> Iterator[int]:
            keep_freed_memory()  # the same setting as in the loader
            for start in range(0, len(jpegs) - BATCH, BATCH):
                for jpeg in jpegs[start : start + BATCH]:
                    decode(jpeg)
                yield BATCH

        return run

    contenders: dict[str, Contender] = {
        "kfood_dist": ours,
        "(a) webdataset, Pillow, image processor": lambda: by_webdataset(shards, split, processor, tokenizer),
        "(b) Dataset and DataLoader, image processor": lambda: by_dataset(jpegs, names, processor, tokenizer),
        "(d) decode alone (libjpeg-turbo, as kfood_dist)": bare(decode_rgb),
        "(d) decode alone (Pillow)": bare(with_pillow),
    }
    absent: dict[str, str] = {}
    for name, add in (("MosaicML streaming", by_mosaic), ("LitData", by_litdata)):
        try:
            contenders[f"(c) {name}, image processor"] = add(jpegs, names, processor, tokenizer, scratch)
        except Exception as error:
            absent[f"(c) {name}"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return contenders, absent


def with_pillow(jpeg: bytes) -> Any:
    import numpy as np
    from PIL import Image

    return np.array(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def batch_of(images: list[Any], names: list[str], processor: Any, tokenizer: Any) -> int:
    """Do the work of a hand-written collate function: the processor's pixels, the chat template, ids and labels."""
    import torch

    pixels = processor(images=images, return_tensors="pt")
    texts = []
    for name, (_, rows, columns) in zip(names, pixels["image_grid_thw"].tolist(), strict=True):
        content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        texts.append(text.replace("<|image_pad|>", "<|image_pad|>" * (rows * columns // 4)) + name)
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    labels = torch.where(encoded["attention_mask"] == 1, encoded["input_ids"], -100)
    assert len(labels) == len(images)
    return len(images)


def in_batches(samples: Iterator[tuple[Any, str]], processor: Any, tokenizer: Any) -> Iterator[int]:
    images: list[Any] = []
    names: list[str] = []
    for image, name in samples:
        images.append(image)
        names.append(name)
        if len(images) == BATCH:
            yield batch_of(images, names, processor, tokenizer)
            images, names = [], []


def by_webdataset(shards: Path, split: Any, processor: Any, tokenizer: Any) -> Iterator[int]:
    import webdataset

    urls = [str(shards / shard.path) for shard in split.manifest.shards_of("train")]
    data = webdataset.WebDataset(urls, shardshuffle=False).shuffle(1000).decode("pil").to_tuple("jpg", "json")
    return in_batches(((image, output["label"]) for image, output in data), processor, tokenizer)


def by_dataset(jpegs: list[bytes], names: list[str], processor: Any, tokenizer: Any) -> Iterator[int]:
    from PIL import Image
    from torch.utils.data import DataLoader

    pairs = list(zip(jpegs, names, strict=True))

    def collate(samples: list[tuple[bytes, str]]) -> int:
        images = [Image.open(io.BytesIO(jpeg)).convert("RGB") for jpeg, _ in samples]
        return batch_of(images, [name for _, name in samples], processor, tokenizer)

    return iter(DataLoader(pairs, BATCH, shuffle=True, drop_last=True, collate_fn=collate))  # type: ignore[arg-type]


def by_mosaic(jpegs: list[bytes], names: list[str], processor: Any, tokenizer: Any, scratch: Path) -> Contender:
    from PIL import Image
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=str(scratch / "mds"), columns={"jpg": "bytes", "label": "str"}) as writer:
        for jpeg, name in zip(jpegs, names, strict=True):
            writer.write({"jpg": jpeg, "label": name})
    data = StreamingDataset(local=str(scratch / "mds"), shuffle=True, batch_size=BATCH)
    return lambda: in_batches(
        ((Image.open(io.BytesIO(s["jpg"])).convert("RGB"), s["label"]) for s in data), processor, tokenizer
    )


def by_litdata(jpegs: list[bytes], names: list[str], processor: Any, tokenizer: Any, scratch: Path) -> Contender:
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter
    from PIL import Image

    writer = BinaryWriter(str(scratch / "lit"), chunk_bytes="64MB")
    for i, (jpeg, name) in enumerate(zip(jpegs, names, strict=True)):
        writer[i] = {"jpg": jpeg, "label": name}
    writer.done()
    writer.merge()
    data = StreamingDataset(str(scratch / "lit"), shuffle=True)
    return lambda: in_batches(
        ((Image.open(io.BytesIO(s["jpg"])).convert("RGB"), s["label"]) for s in data), processor, tokenizer
    )


# --- packing


def photographs(folder: Path, size: tuple[int, int], count: int = 40) -> list[bytes]:
    """Return pictures of a folder as JPEG files of this size."""
    from PIL import Image

    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    made = []
    for path in paths[:: max(1, len(paths) // count)][:count]:
        buffer = io.BytesIO()
        with Image.open(path) as image:
            image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=90)
        made.append(buffer.getvalue())
    return made


def about_photographs(folder: Path) -> str:
    from PIL import Image

    paths = [p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg")]
    width, height = (round(statistics.median(side)) for side in zip(*(Image.open(p).size for p in paths), strict=True))
    return (
        f"\n40 of the {len(paths)} pictures in `{folder.name}` (median size {width}×{height}) were packed. They were "
        "resized to the named size and stored at quality 90.\n"
    )


def exactly_resized(data: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB").resize((224, 224), Image.Resampling.LANCZOS)


def pillow_alone(data: bytes) -> bytes:
    buffer = io.BytesIO()
    exactly_resized(data).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def packers(folder: Path, size: tuple[int, int]) -> dict[str, Contender]:
    from kfood_dist.data.picture.images import prepare_jpeg
    from kfood_dist.data.picture.resample import _bands
    from kfood_dist.system.processes import keep_freed_memory

    files = photographs(folder, size)

    def each(make: Callable[[bytes], object]) -> Contender:
        def run() -> Iterator[int]:
            for data in files:
                make(data)
                yield 1

        return run

    def ours() -> Iterator[int]:
        keep_freed_memory()  # as in a worker of `kfood pack`
        return each(lambda data: prepare_jpeg(data, 224))()

    def anew(data: bytes) -> None:
        _bands.cache_clear()
        prepare_jpeg(data, 224)

    def ours_anew() -> Iterator[int]:
        keep_freed_memory()
        return each(anew)()

    return {"kfood_dist": ours, NO_SIZE_TWICE: ours_anew, "Pillow at full decode": each(pillow_alone)}


def fidelity(folder: Path, size: tuple[int, int]) -> dict[str, tuple[float, float]]:
    """Return the least and the median PSNR in dB of each result, compared with the exactly resized picture.

    The exact picture is taken before JPEG compression.
    """
    import numpy as np

    from kfood_dist.data.picture.images import prepare_jpeg

    found: dict[str, list[float]] = {"kfood_dist": [], "Pillow at full decode": []}
    for data in photographs(folder, size):
        exact = np.asarray(exactly_resized(data), dtype=np.float64)
        for name, made in (("kfood_dist", prepare_jpeg(data, 224)), ("Pillow at full decode", pillow_alone(data))):
            error = np.mean((with_pillow(made) - exact) ** 2)
            found[name].append(float(10 * np.log10(255**2 / error)))
    return {name: (min(values), statistics.median(values)) for name, values in found.items()}


# --- the report


def machine() -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"python": platform.python_version(), "processor": processor_name(), "versions": versions}


def processor_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def report(loading: dict, absent: dict, packing: dict, quality: dict, resumed: dict) -> str:
    about = machine()
    used = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [f"One core of {about['processor']}, Python {about['python']}; {used}.", ""]
    lines += ["| ready batches of 16 | pictures/s | kfood_dist is |", "|---|---:|---:|"]
    lines += [f"| {n} | {rate:,.0f} | {loading['kfood_dist'] / rate:.2f} × |" for n, rate in loading.items()]
    lines += [f"| {name} | | {why} |" for name, why in absent.items()]
    lines += ["", "| packing to 224 px | pictures/s | ratio | PSNR in dB, least and median |", "|---|---:|---:|---|"]
    for size, rates in packing.items():
        for name, rate in rates.items():
            least, median = quality[size]["kfood_dist" if name == NO_SIZE_TWICE else name]
            ratio = rate / rates["Pillow at full decode"]
            lines.append(f"| {size[0]}×{size[1]}, {name} | {rate:,.0f} | {ratio:.2f} × | {least:.1f}, {median:.1f} |")
    seconds = ", ".join(f"{name} {value:.2f} s" for name, value in resumed.items() if isinstance(value, float))
    lines += ["", f"Resuming at step {resumed['step']:,}, the end of epoch 3 of {resumed['samples']:,} samples in "]
    lines[-1] += f"{resumed['shards']:,} shards: {seconds}."
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
