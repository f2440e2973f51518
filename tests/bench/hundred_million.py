"""Measure a resume at the end of an epoch of 100 million samples, from the saved position to the first batch.

    50,000 shards of 2,000 samples (hard links to one tar and one index) ──► fresh process: open, plan, resume, read

The files are real and each is opened by its own name. Only their bytes are the same, so that 100 million samples fit
on one disk. `python tests/bench/data.py` runs this measurement too. To run only this one:
`python tests/bench/hundred_million.py --model DIR`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NUM_SHARDS = 50_000
SAMPLES_PER_SHARD = 2_000
ROOT = Path(__file__).resolve().parents[2]


def build(shards: Path, out: Path) -> None:
    """Write a packed folder of NUM_SHARDS × SAMPLES_PER_SHARD training samples with the pictures of `shards`."""
    from kfood_dist.data.shards.manifest import load_manifest, with_checksum
    from kfood_dist.data.shards.reader import open_split
    from kfood_dist.data.shards.tars import Entry, save_index, write_tar
    from kfood_dist.system.files import file_sha256

    split = open_split(shards, "train")
    out.mkdir(parents=True)

    def entries():
        for n in range(SAMPLES_PER_SHARD):
            i = n % len(split)
            sample, row = split.read(i), split.rows([i])[0]
            output = json.dumps(sample.columns, ensure_ascii=False).encode()
            label, group, tokens = (int(row[name]) for name in ("label", "group", "tokens"))
            yield Entry(f"train-{n:08d}", sample.pictures, output, label, group, tokens)

    tar, index = out / "train-000000.tar", out / "train-000000.index.npy"
    save_index(index, write_tar(tar, entries()))
    described = {"bytes": tar.stat().st_size, "sha256": file_sha256(tar), "samples": SAMPLES_PER_SHARD}
    of_index = {"bytes": index.stat().st_size, "sha256": file_sha256(index)}
    listed = []
    for n in range(NUM_SHARDS):
        name = f"train-{n:06d}"
        if n:
            os.link(tar, out / f"{name}.tar")
            os.link(index, out / f"{name}.index.npy")
        listed.append(
            {"split": "train", "path": f"{name}.tar", **described, "index": {"path": f"{name}.index.npy", **of_index}}
        )
    raw = load_manifest(shards).raw | {"shards": listed}
    raw["splits"]["train"]["samples"] = NUM_SHARDS * SAMPLES_PER_SHARD
    (out / "manifest.json").write_bytes(with_checksum(raw))


def resume(shards: Path, model: str) -> dict[str, Any]:
    """Return the seconds of each part of a resume two steps before the end of epoch 3, in this process."""
    began = time.perf_counter()
    import torch  # noqa: F401

    from kfood_dist.data.batch.collate import StreamingCollator
    from kfood_dist.data.batch.loader import stream
    from kfood_dist.data.batch.template import Template
    from kfood_dist.data.plan.plan import Plan
    from kfood_dist.data.plan.sampling import build_order
    from kfood_dist.data.shards.reader import open_split
    from kfood_dist.data.task.dish import DishTask
    from kfood_dist.model.base import load_config
    from kfood_dist.model.processor import load_tokenizer
    from kfood_dist.model.vision import load_pictures

    template = Template(load_tokenizer(model), load_pictures(model, load_config(model), 224), 1536)
    marks = {"imports and tokenizer": time.perf_counter() - began}

    began = time.perf_counter()
    split = open_split(shards, "train")
    marks["open"] = time.perf_counter() - began
    order = build_order([len(split)], [1.0], index_hash=split.index_hash)
    plan = Plan(order, seed=0, ranks=8, micro_batch=16, accumulation=8)
    saved = json.dumps(plan.state(4 * plan.steps_per_epoch - 2))  # as in a checkpoint, two steps before the end
    step = plan.resume(json.loads(saved))
    collator = StreamingCollator(split, template, DishTask("", "이름은?", split.classes))
    batches = stream(collator, plan.micro_batches(0, step, step + 2), num_workers=1)
    batch = next(iter(batches))
    marks["to the first batch"] = time.perf_counter() - began
    return {"samples": len(split), "shards": len(split.manifest.shards), "step": step, "batch": len(batch.ids)} | marks


def measure(shards: Path, model: str) -> dict[str, Any]:
    """Build the large folder in a temporary folder and time a resume in a fresh process."""
    with tempfile.TemporaryDirectory(dir=shards.parent) as folder:
        large = Path(folder) / "large"
        build(shards, large)
        command = [sys.executable, __file__, "--resume", str(large), "--model", model]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=Path, default=ROOT / "shards/practice", help="a packed folder to multiply")
    parser.add_argument("--model", default=str(ROOT / "data/practice/model"), help="base model whose tokenizer is used")
    parser.add_argument("--resume", type=Path, metavar="LARGE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    print(json.dumps(resume(args.resume, args.model) if args.resume else measure(args.shards, args.model)))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
