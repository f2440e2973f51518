"""What the peers share: the same model, adapter, optimiser and rows, and a record of every step.

    settings.json ──► base model in NF4, LoRA, TrainingArguments ──► the peer's trainer ──► Record ──► result.json

A peer runs in its own environment, so this module imports nothing of this project.
"""

import hashlib
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

IGNORED = -100


@dataclass(frozen=True)
class Settings:
    """The settings of one run, as tests/bench/training/peers.py writes them."""

    model: str
    rows: str
    out: str
    steps: int
    batch: int  # samples per micro-step
    accumulation: int
    workers: int
    recompute: bool
    dropout: float
    r: int
    alpha: int
    target_modules: str  # a regular expression
    learning_rate: float
    max_grad_norm: float
    seed: int
    system: str
    prompt: str

    @classmethod
    def read(cls) -> "Settings":
        """Return the settings in the file that the command line names."""
        return cls(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))

    def read_rows(self) -> list[dict[str, str]]:
        """Return the samples of all steps in their order. Each has an image (a path) and an answer."""
        lines = Path(self.rows).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines[: self.steps * self.batch * self.accumulation]]

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of TrainingArguments, or of a class that extends it."""
        return {
            "output_dir": str(Path(self.out).parent / "run"),
            "max_steps": self.steps,
            "per_device_train_batch_size": self.batch,
            "gradient_accumulation_steps": self.accumulation,
            "dataloader_num_workers": self.workers,
            "gradient_checkpointing": self.recompute,
            "gradient_checkpointing_kwargs": {"use_reentrant": False} if self.recompute else None,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "optim": "adamw_8bit",
            "weight_decay": 0.0,
            "max_grad_norm": self.max_grad_norm,
            "bf16": True,
            "use_cpu": not torch.cuda.is_available(),
            "seed": self.seed,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "remove_unused_columns": False,
        }


def load_model(settings: Settings) -> Any:
    """Return the base model in NF4 with double quantisation, in training mode. The vision tower stays in bf16."""
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )
    model = AutoModelForImageTextToText.from_pretrained(
        settings.model,
        quantization_config=quantization,
        dtype=torch.bfloat16,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
        attn_implementation="sdpa",
    )
    return model.train()  # a forward pass in evaluation mode would repack the weights on some CPUs


def load_processor(settings: Settings) -> Any:
    """Return the model's processor. Without torchvision it is built without the processor of videos."""
    from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLProcessor

    class WithoutVideos(Qwen2_5_VLProcessor):  # type: ignore[misc]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> type:
            return type(argument)

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    return WithoutVideos(
        image_processor=AutoImageProcessor.from_pretrained(settings.model),
        tokenizer=tokenizer,
        video_processor=None,
        chat_template=tokenizer.chat_template,
    )


def lora(settings: Settings) -> Any:
    """Return the adapter's config."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        task_type="CAUSAL_LM",
    )


@dataclass
class Record:
    """The micro-batches and the times of a run."""

    settings: Settings
    ends: list[float] = field(default_factory=list)  # the start of the training, then the end of each step
    losses: list[float] = field(default_factory=list)
    micro_batches: list[tuple[int, list[list[list[int]]]]] = field(default_factory=list)  # slots, samples

    def see(self, inputs: dict[str, Any]) -> None:
        """Keep the token ids and label ids of each sample of a micro-batch."""
        masks, labels = inputs["attention_mask"].bool(), inputs["labels"]
        rows = zip(inputs["input_ids"], masks, labels, strict=True)
        samples = [[ids[mask].tolist(), row[row != IGNORED].tolist()] for ids, mask, row in rows]
        self.micro_batches.append((inputs["input_ids"].numel(), samples))

    def write(self, model: Any) -> None:
        """Write the result of the run as JSON."""
        steps = []
        for start in range(0, len(self.micro_batches), self.settings.accumulation):
            part = self.micro_batches[start : start + self.settings.accumulation]
            samples = [sample for _, of_batch in part for sample in of_batch]
            steps.append(
                {
                    "num_label_tokens": sum(len(labels) for _, labels in samples),
                    "num_tokens": sum(len(ids) for ids, _ in samples),
                    "num_slots": sum(slots for slots, _ in part),
                    "digest": hashlib.sha256(json.dumps(samples).encode()).hexdigest(),
                }
            )
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        result = {
            "step_ends": self.ends,
            "losses": self.losses,
            "steps": steps,
            "num_trained": sum(parameter.numel() for parameter in trained),
            "trained_dtypes": sorted({str(parameter.dtype) for parameter in trained}),
            "threads": torch.get_num_threads(),
        }
        Path(self.settings.out).write_text(json.dumps(result), encoding="utf-8")


class Clock(TrainerCallback):
    """Takes the times and losses of the steps."""

    def __init__(self, record: Record):
        self.record = record

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.record.ends.append(time.time())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.record.ends.append(time.time())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.record.losses.append(float(logs["loss"]))


def in_order(trainer: type, record: Record) -> Any:
    """Return a trainer class that reads the samples in their order, and records its micro-batches."""

    class InOrder(trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

        def training_step(self, model: Any, inputs: dict[str, Any], *more: Any, **named: Any) -> Any:
            record.see(inputs)
            return super().training_step(model, inputs, *more, **named)

    return InOrder
