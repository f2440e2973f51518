"""The recipe: one YAML file that says everything about a run, checked before anything is loaded.

    recipe.yaml + `--set a.b=c` ──► load_recipe ──► Recipe (frozen, complete) ──► saved in the run directory

A file may begin with `extends: OTHER.yaml` and hold only what differs from that one.
Unknown keys are refused and all faults are reported together, each with its fix. Nothing below this module
holds a number of its own: image size, lengths, prompt and model name all come from here.
"""

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from kfood_dist.config import yaml_text as recipe_yaml
from kfood_dist.errors import RecipeError
from kfood_dist.system.files import write_whole

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
        if not {int, float} & _kinds(cls.model_fields[str(info.field_name)].annotation):
            return value
        if isinstance(value, bool):
            raise ValueError(f"a number is needed, not {str(value).lower()}")
        if isinstance(value, str) and re.match(r"\s*[-+]?0[0-9_]", value):
            raise ValueError(f"{value} may be read as octal; write the number without the leading 0")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation allows; of a Literal the types of its values, of a tuple `tuple`."""
    origin = get_origin(annotation)
    if origin is None:
        return {annotation}
    if origin is Literal:
        return {type(value) for value in get_args(annotation)}
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    return {origin} if origin is tuple else set().union(*map(_kinds, get_args(annotation)))


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


_Section = TypeVar("_Section", bound=Section)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply `section.key=value` overrides in order, and check all of it.

    A text key takes what stands after `=`, without quotes around the whole (`run.dir=runs/try #2`); `null` unsets a key
    that has no value by default. Other values are YAML (`train.max_steps=20`). Raises RecipeError naming every fault.
    """
    return build_recipe(_read_yaml(path), overrides, f"recipe {path}")


def build_recipe(tree: dict[str, Any], overrides: Sequence[str], title: str) -> Recipe:
    """A recipe from sections of keys and `section.key=value` overrides; `title` names it in RecipeError."""
    faults = [fault for text in overrides if (fault := _apply_override(tree, text))]
    return _checked(Recipe, tree, faults, title, "mend what is named, in the file or in --set")


def build_data(tree: dict[str, Any], title: str) -> Data:
    """The `data` section alone, for commands that need no more of a recipe. Raises RecipeError naming every fault."""
    return _checked(Data, tree, [], title, "mend what is named")


def _checked(model: type[_Section], tree: dict[str, Any], faults: list[str], title: str, remedy: str) -> _Section:
    try:
        made = model.model_validate(tree)
    except ValidationError as error:
        faults = faults + [_describe(e, model) for e in error.errors()]
    if faults:
        raise RecipeError(_join(title, faults), remedy)
    return made


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, every default included, as YAML that `load_recipe` reads back.

    Raises CheckpointError where it cannot be written; what was there before is whole then.
    """
    write_whole(path, recipe_yaml.write_tree(recipe.model_dump(mode="json")))


def _read_yaml(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The sections of a recipe file, over those of the file it extends; `below` are the files that extend it."""
    try:
        tree = recipe_yaml.read_file_text(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"recipe {path} cannot be read ({error.strerror})",
            "name one of launch/recipes/*.yaml or your own",
        ) from None
    except recipe_yaml.UnclearText as error:
        raise RecipeError(
            f"recipe {path}, {error}", "put quotes around the whole text, or a space after the # of a comment"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or an endless number
        first_line = " ".join(str(error).split())
        raise RecipeError(
            f"recipe {path} is not YAML ({first_line})", "mend that line; a text with `: ` or signs in it needs quotes"
        ) from None
    extended = tree.pop("extends", None) if isinstance(tree, dict) else None
    if not isinstance(tree, dict) or not all(isinstance(v, dict) for v in tree.values()):
        raise RecipeError(
            f"recipe {path} does not hold sections",
            f"write it as `section:` with indented `key: value` lines; sections: {', '.join(Recipe.model_fields)}",
        )
    if extended is None:
        return tree
    if not isinstance(extended, str) or path.resolve() in below:
        fault = "extends itself" if isinstance(extended, str) else f"has `extends: {extended}`"
        raise RecipeError(f"recipe {path} {fault}", "name one other recipe file there, relative to this one")
    lower = _read_yaml(path.parent / extended, (*below, path.resolve()))
    return lower | {section: lower.get(section, {}) | keys for section, keys in tree.items()}


def _apply_override(tree: dict[str, Any], text: str) -> str | None:
    """Put one `section.key=value` into the tree; a fault's description if it has another form."""
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        return f"--set {text}: write it as section.key=value, for example train.max_steps=20"
    value = value.strip() if name.endswith(" ") else value  # `key = value`
    kinds = _kinds_of(section, key)
    if not value.strip() and kinds and str not in kinds:
        remedy = "write null for none" if type(None) in kinds else "write one after ="
        return f"--set {text}: there is no value; {remedy}"
    try:
        parsed = _typed(value, kinds)
    except recipe_yaml.UnclearText as error:
        return f"--set {text}: {error}; leave it out, or put quotes around a text that has it"
    except (yaml.YAMLError, ValueError, RecursionError):
        return f"--set {text}: the value is not YAML; put quotes around each text in it"
    tree.setdefault(section, {})[key] = parsed
    return None


def _kinds_of(section: str, key: str) -> set[Any]:
    """The types that a recipe's `section.key` allows; none for an unknown key."""
    field = Recipe.model_fields.get(section)
    keys = field.annotation.model_fields if field else {}  # type: ignore[union-attr]
    return _kinds(keys[key].annotation) if key in keys else set()


def _typed(value: str, kinds: set[Any]) -> Any:
    """What `value` means for a key of these types. Raises yaml.YAMLError, ValueError or RecursionError."""
    if not {str, Path} & kinds:
        return recipe_yaml.read_value(value)
    if value == "null" and type(None) in kinds:
        return None
    return recipe_yaml.read_text(value)


def _describe(error: Any, model: type[Section]) -> str:
    """One fault of pydantic's in our words: where, what, and the nearest right key for a wrong one."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _known_keys(model, error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        return f"{where}: no such key; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}")
    if error["type"] == "missing":
        return f"{where}: missing; add it"
    if error["type"] == "value_error":
        return (f"{where}: " if where else "") + error["msg"].removeprefix("Value error, ")
    if error["type"] in ("string_type", "path_type"):
        return f"{where}: a text is needed, and YAML reads {_spelled(error['input'])}; put quotes around the whole text"
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}, not {error['input']!r}"


def _spelled(value: Any) -> str:
    """What YAML made of an unquoted text, in words."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    kinds = {int: "the number", float: "the number", dict: "a section", list: "a list"}
    return f"{kinds.get(type(value), 'a value')} {value!r}"


def _known_keys(model: type[Section], location: tuple[Any, ...]) -> list[str]:
    """The keys of the section at `location`, in which a number is a place in a list of sections."""
    kind: Any = model
    for part in location:
        kind = get_args(kind)[0] if isinstance(part, int) else kind.model_fields[part].annotation
    return list(kind.model_fields)


def _join(title: str, faults: list[str]) -> str:
    if len(faults) == 1:
        return f"{title}: {faults[0]}"
    return f"{title} has {len(faults)} faults:\n" + "\n".join(f"  - {fault}" for fault in faults) + "\n"
