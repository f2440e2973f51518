"""The checks of what a run reads: its shards and its base model."""

import sys
from collections.abc import Iterator
from pathlib import Path

from kfood_dist.doctor.finding import FAULT, OK, WARN, Finding
from kfood_dist.system.words import plural


def check_shards(folder: Path) -> Iterator[Finding]:
    """Check that a shard folder can be read.

    Reads the manifest, checks that all files are there with their sizes, and decodes the first and the last sample of
    each split.
    """
    from kfood_dist.data.picture.images import decode_rgb
    from kfood_dist.data.shards.manifest import load_manifest
    from kfood_dist.data.shards.reader import open_split

    manifest = load_manifest(folder)
    counts = []
    for split in manifest.splits:
        shards = open_split(folder, split)
        shards.require_files()
        for i in {0, len(shards) - 1}:
            for picture in shards.read(i).pictures:
                decode_rgb(picture)
        shards.close()
        counts.append(f"{split} {len(shards)}")
    dishes = plural(len(manifest.classes), "dish", "dishes")
    yield Finding(
        OK if counts else FAULT,
        f"{folder}: {dishes} at {manifest.image_size} px, {', '.join(counts) or 'no pictures'}",
        "" if counts else "pack it again",
    )


def check_model(base: str, shards: Path | None) -> Iterator[Finding]:
    """Check that the base model's files are complete, and build the template from them as training does.

    Reads no weights.
    """
    from kfood_dist.config.sections import Data
    from kfood_dist.data.shards.manifest import load_manifest
    from kfood_dist.model.base import load_config
    from kfood_dist.model.files import base_folder, require_base
    from kfood_dist.model.processor import build_template
    from kfood_dist.model.vision import blank

    require_base(base)
    if base_folder(base) is None:
        yield Finding(WARN, f"{base} is on the hub, not here", f"hf download {base}, or let training download it")
        return
    image_size = Data.model_fields["image_size"].default if shards is None else load_manifest(shards).image_size
    # The recipe sets the largest length of a sample, and there is no recipe here.
    settings = Data(shards=str(shards or "."), image_size=image_size, max_length=sys.maxsize)
    num_tokens = len(build_template(base, settings).pictures.encode(blank(image_size)).ids)
    yield Finding(OK, f"{base}: {load_config(base).model_type}, {num_tokens} tokens for a picture")
