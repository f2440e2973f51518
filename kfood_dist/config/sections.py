"""What a recipe may say: its sections, their keys with type, limits and default, and what does not go together.

Frozen, without unknown keys; nothing below holds a number of its own: image size, lengths, prompt and model name all
come from here. `recipe.py` reads a recipe from its file.
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


# With a leading `~` expanded, which a shell does not do after `=`; one of an unknown user stays, as in a shell.
Folder = Annotated[Path, BeforeValidator(_named), AfterValidator(lambda path: Path(os.path.expanduser(path)))]
FolderOrName = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]


class Section(BaseModel):
    """A recipe section: no unknown keys, no changes after loading."""

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
    """The types that an annotation allows; of a Literal the types of its values, of a tuple `tuple`."""
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
        1.0, gt=0, le=1000, description="how often its pictures are drawn for each time one of data.shards is"
    )


class Data(Section):
    shards: FolderOrName = Field(description="folder or URL that `kfood pack` wrote")
    mix: tuple[MixedIn, ...] = Field((), description="further data sets to train on: `- {shards: DIR, weight: 0.5}`")
    class_balance: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="0 draws every picture alike, 1 every class; between, a class of n in proportion to n^(1 - it)"
    )
    shuffle_window: Count | None = Field(
        None,
        description="pictures shuffled together, read as 64 long runs; for file systems that dislike single reads "
        "(default: all, up to a million)",
    )
    image_size: Count = Field(224, description="side of the packed pictures in pixels; must be the shards' own")
    max_length: Count = Field(1536, description="most tokens in one sample; longer ones lose text from the front")
    task: Literal["dish", "question"] = Field(
        "dish", description="dish: name the picture's class; question: answer the sample's own question"
    )
    system: str = Field("You are a helpful assistant.", description="system text; empty for none")
    prompt: str = Field(
        "이 음식의 이름은 무엇인가요? 음식 이름만 답하세요.",
        min_length=1,
        description="question put after the pictures; {question} stands for the sample's own, and is the default of "
        "task question",
    )
    num_workers: int = Field(1, ge=0, description="loader processes per rank; 0 reads in the training process")
    worker_start: Literal["fork", "spawn"] = Field(
        "fork", description="how loader processes start; spawn where a network driver does not survive a fork"
    )
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01, description="share of the training split that may turn out unreadable before the run stops"
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
            raise ValueError("data.prompt has no {question}, without which every sample is asked the same")
        if self.task == "dish" and "{question}" in self.prompt:
            raise ValueError("data.prompt has {question}, which the task dish does not fill; set data.task=question")
        return self


class Model(Section):
    base: FolderOrName = Field(description="local folder or hub name of a vision-language model, such as a Qwen2.5-VL")
    quantization: Literal["nf4", "none"] = Field("nf4", description="4-bit NF4 with double quantisation, or none")
    precision: Literal["bf16", "fp16", "fp32"] = Field(
        "bf16",
        description="compute type of everything not quantised; fp16, for cards without bf16, scales the loss and "
        "keeps the vision tower in float32",
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="attention kernel")
    adapter: Folder | None = Field(None, description="trained adapter to start from, such as runs/NAME/adapter")

    @model_validator(mode="after")
    def _attention_has_its_type(self) -> "Model":
        if self.attention == "flash_attention_2" and self.precision != "bf16":
            why = {"fp16": "fp16 keeps the vision tower in float32", "fp32": "fp32 computes in float32"}
            raise ValueError(
                f"flash_attention_2 has no float32, and {why[self.precision]}; set model.precision=bf16, or "
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


def _spelled_out(part: Any) -> Any:
    return {"train": part} if isinstance(part, str) else part


class Part(Section):
    """How one part of the model trains; `connector: full` is short for `connector: {train: full}`."""

    train: Literal["frozen", "lora", "full"] = Field("frozen", description="not at all, by LoRA, or all its weights")
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None, description="the part's own peak learning rate (default: optim.learning_rate)"
    )

    @model_validator(mode="after")
    def _rate_of_what_trains(self) -> "Part":
        if self.train == "frozen" and self.learning_rate is not None:
            raise ValueError("is frozen and has a learning_rate; leave it out, or set train to lora or full")
        return self


PartField = Annotated[Part, BeforeValidator(_spelled_out)]


class Parts(Section):
    language_model: PartField = Field(Part(train="lora"), description="frozen, lora, or full without quantisation")
    connector: PartField = Field(Part(), description="what turns the tower's features into the language model's")
    tower: PartField = Field(Part(), description="the vision tower")

    @model_validator(mode="after")
    def _something_trains(self) -> "Parts":
        if all(way == "frozen" for way in self.ways().values()):
            raise ValueError("every part is frozen; set one of them to lora or full")
        return self

    def ways(self) -> dict[str, str]:
        """How each part trains, by its name."""
        return {name: getattr(self, name).train for name in type(self).model_fields}

    def trained_whole(self) -> list[str]:
        """The parts that train in full."""
        return [name for name, way in self.ways().items() if way == "full"]


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
        description="what is minimised: the mean loss per token of the answers, or per answer, each counting alike; "
        "with answer_mean the lowest loss makes the best checkpoint, with answer the highest accuracy",
    )


class Train(Section):
    micro_batch_size: Count = Field(4, le=2**16, description="samples per rank and micro-step")
    gradient_accumulation_steps: Count = Field(8, le=2**16, description="micro-steps per optimiser step")
    global_batch_size: Count | None = Field(
        None,
        description="samples per optimiser step; if given, accumulation follows from it and the rank count",
    )
    max_steps: Count | None = Field(None, description="optimiser steps in all; overrides epochs")
    epochs: Count = Field(1, description="passes over the training split")
    save_every_steps: Count = Field(100, description="steps between checkpoints; the last step always saves")
    keep_checkpoints: Count = Field(2, description="newest complete checkpoints to keep")
    publish: Literal["best", "last"] = Field(
        "best",
        description="whose adapter a finished run publishes: the best checkpoint's by validation accuracy (the last "
        "one's if nothing was measured), or the last one's",
    )
    seed: int = Field(0, ge=0, lt=2**32)
    stall_timeout_s: Annotated[float, Field(ge=10, le=86400)] = Field(
        600.0, description="a rank that makes no progress for so long ends the run and is named"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="DeepSpeed ZeRO stage; 0 trains without DeepSpeed")
    deepspeed_config: Folder | None = Field(None, description="memory strategy; default ds_configs/zero<stage>.json")
    max_skipped_steps: int = Field(
        10, ge=0, description="steps in a row whose loss or gradient may fail to be finite before the run stops"
    )
    gradient_checkpointing: bool = Field(True, description="recompute activations instead of keeping them")


class Eval(Section):
    split: Literal["val", "test", "train"] = Field("val", description="split measured while training")
    every_steps: Count | None = Field(
        None, description="steps between measurements, also after the last step; none unless given"
    )
    max_samples: Count | None = Field(None, description="measure on the first so many of a fixed shuffle")
    batch_size: Count = Field(16, description="pictures per rank and generation batch")
    max_new_tokens: Count = Field(32, description="longest answer in tokens")


class Run(Section):
    dir: Folder = Field(description="run directory: recipe, metrics, TensorBoard, checkpoints, adapter")
    log_every_steps: Count = Field(1, description="steps between console lines")


class Recipe(Section):
    """The whole recipe; `Recipe.model_fields` and `docs` of each section are the reference."""

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
                "parts.language_model is full, and 4-bit weights do not train; set model.quantization=none, or "
                "parts.language_model=lora"
            )
        return self
