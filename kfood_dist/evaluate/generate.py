"""Asking a model: from batches of pictures to greedy answers with their probabilities.

    base + adapter ──► load_answerer ──► Answerer ──► answers of a batch; alternatives for one picture

This process never trains, so the model is put into evaluation mode. (On a CPU with AVX512-BF16, the first forward pass
in that mode repacks 4-bit weights permanently. Training in this process would be wrong after that.)
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kfood_dist.data.batch.collate import Batch
from kfood_dist.data.batch.template import Template
from kfood_dist.errors import LaunchError
from kfood_dist.evaluate.settings import Settings
from kfood_dist.model.load import load_base
from kfood_dist.system import gpus
from kfood_dist.system.words import plural
from kfood_dist.system.world import World


@dataclass(frozen=True)
class Answer:
    """What the model wrote, and the probability that it gave to exactly that text and its end, 0 to 1."""

    text: str
    confidence: float


def pick_device(world: World) -> torch.device:
    """Return the device of this rank: its own GPU, or the CPU if the machine has no GPU.

    Raises LaunchError if torch cannot use the GPUs, or if there are more processes than GPUs.
    """
    gpus.require_usable()
    if not torch.cuda.is_available():
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    if world.local_rank >= num_gpus:
        raise LaunchError(
            f"{world.local_rank + 1} or more processes of this machine share {plural(num_gpus, 'GPU')}",
            "start as many processes as there are GPUs",
        )
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    return device


def load_answerer(
    settings: Settings,
    template: Template,
    base: str,
    adapter: Path | None,
    device: torch.device,
    max_new_tokens: int,
) -> "Answerer":
    """Load a base, and an adapter if given, to answer. `processor.build_template` has checked that they fit."""
    model = load_base(base, settings.quantization, settings.precision, settings.attention, device)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    return Answerer(model.eval(), template, max_new_tokens, device)


class Answerer:
    """A loaded model with its template. It uses no sampling and no penalties: it writes the likeliest token."""

    def __init__(self, model: Any, template: Template, max_new_tokens: int, device: torch.device):
        from transformers import GenerationConfig

        self.model = model
        self.template = template
        self.device = device
        tokenizer = template.tokenizer
        self.end_tokens = sorted({tokenizer.eos_token_id, *_end_tokens(model.generation_config)})
        self._pictures = template.pictures
        self._generation_options = {
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "eos_token_id": self.end_tokens,
            "pad_token_id": tokenizer.pad_token_id,
            "return_dict_in_generate": True,
        }
        # A base may come with sampling and penalties (Qwen2.5-VL does: repetition_penalty 1.05). generate() would
        # use them for every setting that is not given here.
        model.generation_config = GenerationConfig()
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.generation_config = GenerationConfig()

    @torch.inference_mode()
    def answer(self, batch: Batch) -> list[Answer]:
        """Return the greedy answer to each picture of a batch collated for generation, in row order."""
        from transformers import GenerationConfig

        length = batch.input_ids.shape[1]
        out = self.model.generate(
            **self._inputs(batch),
            generation_config=GenerationConfig(**self._generation_options, num_beams=1, output_logits=True),
        )
        written = out.sequences[:, length:]
        log_probability = torch.zeros(len(written), device=written.device)
        ended = torch.zeros(len(written), dtype=torch.bool, device=written.device)
        ends = torch.tensor(self.end_tokens, device=written.device)
        for token, logits in zip(written.T, out.logits, strict=True):
            step = logits.float().log_softmax(-1).gather(-1, token[:, None])[:, 0]
            log_probability += step.masked_fill(ended, 0.0)  # what follows the end token is padding
            ended |= torch.isin(token, ends)
        texts = (self.template.decode(ids) for ids in written.tolist())
        return [Answer(t, _probability(p)) for t, p in zip(texts, log_probability.tolist(), strict=True)]

    @torch.inference_mode()
    def alternatives(self, batch: Batch, num_beams: int) -> list[Answer]:
        """Return the `num_beams` likeliest texts of a beam search for the one picture of a batch, likeliest first."""
        from transformers import GenerationConfig

        length = batch.input_ids.shape[1]
        out = self.model.generate(
            **self._inputs(batch),
            generation_config=GenerationConfig(
                **self._generation_options,
                num_beams=num_beams,
                num_return_sequences=num_beams,
                length_penalty=0.0,  # the score stays the sum of log-probabilities
                early_stopping=False,
                output_scores=True,
            ),
        )
        texts = (self.template.decode(ids) for ids in out.sequences[:, length:].tolist())
        return [Answer(t, _probability(p)) for t, p in zip(texts, out.sequences_scores.tolist(), strict=True)]

    def _inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        batch = batch.to(self.device)
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            **self._pictures.to_model(batch.pixels, batch.facts | batch.shapes, batch.is_image),
        }


def _end_tokens(generation_config: Any) -> list[int]:
    ends = generation_config.eos_token_id
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


def _probability(log_probability: float) -> float:
    return float(f"{min(1.0, math.exp(log_probability)):.6g}")  # more digits would be rounding noise of the sum
