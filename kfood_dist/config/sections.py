"""What a recipe may contain: its sections, the type, limits and default of each key, and which keys conflict.

Sections are frozen and refuse unknown keys. No module that uses a recipe defines such values itself: image size,
lengths, prompt and model name all come from here. `recipe.py` reads a recipe from its file.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


def _named(folder: Any) -> Any:
    if isinstance(folder, str) and not folder.strip():  # Path("") would be the working directory
        raise ValueError("is empty; name a folder")
    return folder


# A leading `~` is expanded, because a shell does not expand it after `=`. The `~name` of an unknown user stays as it
# is, as in a shell.
Folder = Annotated[Path, BeforeValidator(_named), AfterValidator(lambda path: Path(os.path.expanduser(path)))]
FolderOrName = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]


class Section(BaseModel):
    """A recipe section. It refuses unknown keys, and cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _clear_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        if not {int, float} & kinds_of(cls.model_fields[str(info.field_name)].annotation):
            return value
        if isinstance(value, bool):
            raise ValueError(f"a number is needed, not {str(value).lower()}")
        if isinstance(value, str) and re.match(r"\s*[-+]?0[0-9_]", value):
            raise ValueError(f"{value} may be read as octal; write the number without the leading 0")
        return value


def kinds_of(annotation: Any) -> set[Any]:
    """Return the types that an annotation allows. A Literal gives the types of its values, a tuple gives `tuple`."""
    origin = get_origin(annotation)
    if origin is None:
        return {annotation}
    if origin is Literal:
        return {type(value) for value in get_args(annotation)}
    if origin is Annotated:
        return kinds_of(get_args(annotation)[0])
    return {origin} if origin is tuple else set().union(*map(kinds_of, get_args(annotation)))


class MixedIn(Section):
    shards: FolderOrName = Field(description="folder or URL of a further packed data set")
    weight: float = Field(
        1.0, gt=0, le=1000, description="how often each of its pictures is drawn, relative to one of data.shards"
    )


class Data(Section):
    shards: FolderOrName = Field(description="folder or URL that `kfood pack` wrote")
    mix: tuple[MixedIn, ...] = Field((), description="further data sets to train on: `- {shards: DIR, weight: 0.5}`")
    class_balance: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="0 draws every picture equally often, 1 every class; between them, a class of n pictures is drawn "
        "in proportion to n^(1 - class_balance)",
    )
    shuffle_window: Count | None = Field(
        None,
        description="how many pictures are shuffled together; they are read in 64 long runs, for file systems that "
        "are slow at single reads (default: all, up to a million)",
    )
    image_size: Count = Field(224, description="side of the packed pictures in pixels; must equal that of the shards")
    max_length: Count = Field(1536, description="most tokens in one sample; a longer sample loses text from the front")
    task: Literal["dish", "question"] = Field(
        "dish", description="dish: name the picture's class; question: answer the sample's own question"
    )
    system: str = Field("You are a helpful assistant.", description="system text; empty for none")
    prompt: str = Field(
        "이 음식의 이름은 무엇인가요? 음식 이름만 답하세요.",
        min_length=1,
        description="question that follows the pictures; {question} stands for the sample's own question, and is the "
        "default prompt of the task question",
    )
    num_workers: int = Field(1, ge=0, description="loader processes per rank; 0: the training process reads the data")
    worker_start: Literal["fork", "spawn"] = Field(
        "fork", description="how loader processes start; use spawn if a network driver does not work after a fork"
    )
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01, description="the run stops if more than this share of the training split cannot be read"
    )

    @model_validator(mode="before")
    @classmethod
    def _prompt_of_the_task(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and tree.get("task") == "question":
            return {"prompt": "{question}", **tree}
        return tree

    @model_validator(mode="after")
    def _prompt_asks(self) -> "Data":
        if self.task == "question" and "{question}" not in self.prompt:
            raise ValueError("data.prompt has no {question}, so every sample would be asked the same")
        if self.task == "dish" and "{question}" in self.prompt:
            raise ValueError("data.prompt has {question}, which the task dish does not fill; set data.task=question")
        return self


class Model(Section):
    base: FolderOrName = Field(description="local folder or hub name of a vision-language model, such as a Qwen2.5-VL")
    quantization: Literal["nf4", "none"] = Field("nf4", description="4-bit NF4 with double quantisation, or none")
    precision: Literal["bf16", "fp16", "fp32"] = Field(
        "bf16",
        description="compute type of everything that is not quantised; fp16 is for cards without bf16: it scales the "
        "loss and keeps the vision tower in float32",
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="attention kernel")
    fast_tower: bool = Field(
        True,
        description="train with a vision tower that computes in fewer, larger operations, equal up to rounding; false: "
        "as transformers does",
    )
    adapter: Folder | None = Field(None, description="trained adapter to start from, such as runs/NAME/adapter")

    @model_validator(mode="after")
    def _attention_has_its_type(self) -> "Model":
        if self.attention == "flash_attention_2" and self.precision != "bf16":
            why = {"fp16": "fp16 keeps the vision tower in float32", "fp32": "fp32 computes in float32"}
            raise ValueError(
                f"flash_attention_2 does not support float32, and {why[self.precision]}; set model.precision=bf16, or "
                "model.attention=sdpa"
            )
        return self


class Lora(Section):
    r: Count = Field(16, description="rank of the update")
    alpha: Count = Field(32, description="scale; the update is multiplied by alpha / r")
    dropout: Share = Field(0.05, description="dropout on the adapter's input")
    target_modules: tuple[str, ...] = Field(
        LINEAR_LAYERS, min_length=1, description="linear layers of the language model that get an adapter"
    )


def _expand_short_form(part: Any) -> Any:
    return {"train": part} if isinstance(part, str) else part


class Part(Section):
    """How one part of the model trains. `connector: full` is short for `connector: {train: full}`."""

    train: Literal["frozen", "lora", "full"] = Field(
        "frozen", description="frozen trains nothing, lora trains a LoRA adapter, full trains all weights"
    )
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None, description="the part's own peak learning rate (default: optim.learning_rate)"
    )

    @model_validator(mode="after")
    def _rate_of_what_trains(self) -> "Part":
        if self.train == "frozen" and self.learning_rate is not None:
            raise ValueError("is frozen but has a learning_rate; remove it, or set train to lora or full")
        return self


PartField = Annotated[Part, BeforeValidator(_expand_short_form)]


class Parts(Section):
    language_model: PartField = Field(
        Part(train="lora"), description="frozen, lora or full; full needs model.quantization=none"
    )
    connector: PartField = Field(Part(), description="maps the tower's features to those of the language model")
    tower: PartField = Field(Part(), description="the vision tower")

    @model_validator(mode="after")
    def _something_trains(self) -> "Parts":
        if all(way == "frozen" for way in self.train_modes().values()):
            raise ValueError("every part is frozen; set one of them to lora or full")
        return self

    def train_modes(self) -> dict[str, str]:
        """Return how each part trains, by its name."""
        return {name: getattr(self, name).train for name in type(self).model_fields}

    def parts_in_full(self) -> list[str]:
        """Return the parts that train in full."""
        return [name for name, way in self.train_modes().items() if way == "full"]


class Optim(Section):
    name: Literal["adamw8bit", "adamw"] = Field("adamw8bit", description="bitsandbytes AdamW8bit, or torch AdamW")
    learning_rate: float = Field(2e-4, gt=0, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="decay after the warm-up")
    warmup_ratio: Share = Field(0.03, description="share of all steps spent warming up")
    min_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="the decay ends at this share of the peak"
    )
    weight_decay: float = Field(0.0, ge=0)
    beta1: Share = Field(0.9)
    beta2: Share = Field(0.999)
    eps: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this global norm")


class Objective(Section):
    name: Literal["answer", "answer_mean"] = Field(
        "answer",
        description="what is minimised: answer is the mean loss per answer token; answer_mean is the mean loss per "
        "answer, in which every answer counts the same; the best checkpoint has the highest accuracy with answer, and "
        "the lowest loss with answer_mean",
    )


class Train(Section):
    micro_batch_size: Count = Field(4, le=2**16, description="samples per rank and micro-step")
    gradient_accumulation_steps: Count = Field(8, le=2**16, description="micro-steps per optimiser step")
    tokens_per_micro_batch: Count | None = Field(
        None,
        description="fill micro-batches with samples of similar length up to this many tokens, padding included, "
        "instead of with micro_batch_size samples; the samples of a step stay the same",
    )
    global_batch_size: Count | None = Field(
        None,
        description="samples per optimiser step; if given, the accumulation follows from it and the number of ranks",
    )
    max_steps: Count | None = Field(None, description="total optimiser steps; overrides epochs")
    epochs: Count = Field(1, description="passes over the training split")
    save_every_steps: Count = Field(100, description="steps between checkpoints; the last step always saves one")
    keep_checkpoints: Count = Field(2, description="newest complete checkpoints to keep")
    publish: Literal["best", "last"] = Field(
        "best",
        description="which adapter a finished run publishes: that of the best checkpoint by validation (the last one "
        "if there was no validation), or that of the last checkpoint",
    )
    seed: int = Field(0, ge=0, lt=2**32)
    stall_timeout_s: Annotated[float, Field(ge=10, le=86400)] = Field(
        600.0, description="if a rank makes no progress for this long, the run ends and names the rank"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="DeepSpeed ZeRO stage; 0 trains without DeepSpeed")
    deepspeed_config: Folder | None = Field(
        None, description="DeepSpeed JSON with the memory strategy (default: ds_configs/zero<stage>.json)"
    )
    max_skipped_steps: int = Field(
        10, ge=0, description="most steps in a row that may be skipped because their loss or gradient is not finite"
    )
    gradient_checkpointing: bool = Field(True, description="recompute activations instead of keeping them")


class Eval(Section):
    split: Literal["val", "test", "train"] = Field("val", description="split to evaluate during training")
    every_steps: Count | None = Field(
        None, description="steps between evaluations; one also follows the last step (default: no evaluation)"
    )
    max_samples: Count | None = Field(None, description="evaluate only this many samples, the first of a fixed shuffle")
    batch_size: Count = Field(16, description="pictures per rank and evaluation batch")
    max_new_tokens: Count = Field(32, description="longest answer in tokens")


class Run(Section):
    dir: Folder = Field(description="run directory: recipe, metrics, TensorBoard, checkpoints, adapter")
    log_every_steps: Count = Field(1, description="steps between console lines")


class Recipe(Section):
    """The complete recipe. `Recipe.model_fields` and the field descriptions of each section are the reference."""

    data: Data
    model: Model
    parts: Parts = Parts()
    lora: Lora = Lora()
    optim: Optim = Optim()
    objective: Objective = Objective()
    train: Train = Train()
    eval: Eval = Eval()
    run: Run

    @model_validator(mode="after")
    def _no_conflicts(self) -> "Recipe":
        if self.train.zero_stage == 0 and self.train.deepspeed_config is not None:
            raise ValueError(
                "train.deepspeed_config is given but train.zero_stage is 0, which trains without DeepSpeed; "
                "remove it or set train.zero_stage to 1, 2 or 3"
            )
        if self.parts.language_model.train == "full" and self.model.quantization != "none":
            raise ValueError(
                "parts.language_model is full, but 4-bit weights cannot train; set model.quantization=none, or "
                "parts.language_model=lora"
            )
        return self
