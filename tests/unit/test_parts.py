"""Which parts train and how, on a Qwen2.5-VL (connector inside the tower) and a LLaVA (connector beside the tower)."""

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from asking import asking_dishes, model_inputs, pictures_of
from bases import write_llava
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from kfood_dist.config.recipe import build_recipe
from kfood_dist.config.sections import Data, Lora, Objective, Parts
from kfood_dist.data.plan.plan import MicroBatch
from kfood_dist.data.task.table import TASKS
from kfood_dist.errors import ModelError, RecipeError
from kfood_dist.model.adapters import (
    adapted_modules,
    load_adapter,
    require_adapter,
    require_adapter_fits,
    require_parts_possible,
    save_adapter,
)
from kfood_dist.model.family import FAMILIES, family_of
from kfood_dist.model.load import load_base
from kfood_dist.model.objective.answer import AnswerLoss
from kfood_dist.model.objective.table import OBJECTIVES
from kfood_dist.model.parts import apply_parts, linear_types, parameter_groups

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["qwen2_5_vl", "llava"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    if request.param == "qwen2_5_vl":
        return tiny_model
    folder = tmp_path_factory.mktemp("llava")
    write_llava(folder)
    return folder


def build(base: Path, **parts: Any) -> Any:
    torch.manual_seed(0)
    model = apply_parts(
        load_base(str(base), "none", "fp32", "sdpa", CPU), Parts.model_validate(parts), Lora(dropout=0.0)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


WAYS: list[dict[str, Any]] = [
    {"language_model": "frozen", "connector": "full"},
    {"language_model": "frozen", "connector": "lora"},
    {"tower": "lora", "connector": {"train": "full", "learning_rate": 0.5}},
    {"tower": "full", "connector": "full", "language_model": "frozen"},
    {"tower": "full"},
    {"language_model": "full"},
]


@pytest.mark.parametrize("parts", WAYS, ids=str)
def test_each_part_trains_as_the_recipe_says(base: Path, parts: dict[str, Any]) -> None:
    model, train_modes = build(base, **parts), Parts.model_validate(parts).train_modes()
    inner = model.get_base_model()
    family = family_of(inner.config)
    trained: dict[str, set[str]] = {part: set() for part in family.paths}
    for name, parameter in inner.named_parameters():
        part = family.part_of(name)
        assert part is not None
        if parameter.requires_grad:
            trained[part].add("lora" if ".lora_" in name else "full")
        elif train_modes.get(part) == "full":
            raise AssertionError(f"{name} is frozen")
    # A tied head is listed only under the name of its embedding.
    assert trained.pop("head") <= {"full"} & trained["language_model"]
    assert trained == {part: set() if way == "frozen" else {way} for part, way in train_modes.items()}
    layers = linear_types(inner, family)
    adapted = adapted_modules(inner)
    for part, way in train_modes.items():
        of_part = [name for name in adapted if family.part_of(name) == part]
        assert len(of_part) == (sum(layers[part].values()) if way == "lora" else 0), part


@pytest.mark.parametrize("parts", WAYS, ids=str)
def test_a_saved_adapter_loads_here_and_in_plain_peft(
    base: Path, parts: dict[str, Any], tiny_shards: Path, tmp_path: Path
):
    from peft import PeftModel

    model = build(base, **parts)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    save_adapter(model, tmp_path, {"parts": Parts.model_validate(parts).train_modes()})
    require_adapter_fits(str(base), tmp_path)
    weights, beside = load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "beside"
    shutil.copytree(tmp_path, beside)
    other = next(name for name, _ in model.named_parameters() if name not in weights and "norm" in name)
    save_file({**weights, other: torch.zeros(3)}, beside / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"its config does not (name|have) "):
        require_adapter_fits(str(base), beside)
    batch = asking_dishes(base, tiny_shards)[MicroBatch(0, 0, (0, 1), 0)]
    inputs = model_inputs(batch, pictures_of(base))
    fresh = build(base, **parts)
    load_adapter(fresh, tmp_path)
    plain = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), tmp_path)
    with torch.no_grad():
        expected, *found = (m.eval()(**inputs).logits for m in (model, fresh, plain))
        untrained = load_base(str(base), "none", "fp32", "sdpa", CPU).eval()(**inputs).logits
    assert all(torch.allclose(logits, expected, atol=1e-5) for logits in found)
    assert (expected - untrained).abs().max() > 1e-2


@pytest.mark.parametrize("parts", WAYS, ids=str)
def test_a_run_may_start_from_the_adapter_of_a_run_with_the_same_parts(
    base: Path, parts: dict[str, Any], tmp_path: Path
) -> None:
    save_adapter(build(base, **parts), tmp_path, {"parts": Parts.model_validate(parts).train_modes()})
    tree = {"data": {"shards": "s"}, "model": {"base": "m", "quantization": "none", "adapter": str(tmp_path)}}
    require_adapter(build_recipe({**tree, "run": {"dir": "r"}, "parts": parts}, [], "recipe"))


@pytest.mark.parametrize("parts", [*WAYS, {"connector": "lora"}, {"connector": "full"}], ids=str)
def test_saving_memory_does_not_change_the_gradients(
    base: Path, parts: dict[str, Any], tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare the gradients with those of the same model without `freeze_forward`."""
    batch = asking_dishes(base, tiny_shards)[MicroBatch(0, 0, (0, 1), 0)]

    def gradients() -> dict[str, torch.Tensor]:
        module = AnswerLoss(build(base, **parts).train(), pictures_of(base))
        module(batch)[0].backward()
        return {name: p.grad for name, p in module.named_parameters() if p.requires_grad and p.grad is not None}

    spared = gradients()
    monkeypatch.setattr("kfood_dist.model.parts.freeze_forward", lambda module: None)
    plain = gradients()
    assert spared.keys() == plain.keys() and all(plain[name].any() for name in plain if "lora_A" not in name)
    assert all(torch.allclose(spared[name], plain[name], rtol=1e-4, atol=1e-6) for name in plain)


def test_a_frozen_tower_keeps_no_graph_even_if_its_connector_trains(base: Path, tiny_shards: Path) -> None:
    """The features of the pictures have no graph up to the connector, and the connector gets its gradients."""
    module = AnswerLoss(build(base, connector="full").train(), pictures_of(base))
    inner = module.model.get_base_model()
    family = family_of(inner.config)
    shown: list[bool] = []
    inner.get_submodule(family.connector).register_forward_pre_hook(
        lambda _, given: shown.append(given[0].requires_grad)
    )
    module(asking_dishes(base, tiny_shards)[MicroBatch(0, 0, (0, 1), 0)])[0].backward()
    assert shown == [False]
    for name, parameter in inner.named_parameters():
        part = family.part_of(name)
        if part == "connector":
            assert parameter.grad is not None and parameter.grad.any(), name
        elif part == "tower":
            assert parameter.grad is None


def test_the_optimiser_gets_a_group_for_each_learning_rate(base: Path) -> None:
    parts = Parts.model_validate({"connector": {"train": "full", "learning_rate": 0.5}, "tower": "lora"})
    model = build(base, **parts.model_dump())
    module, family = AnswerLoss(model, pictures_of(base)), family_of(model.get_base_model().config)
    groups = {group["name"]: group for group in parameter_groups(module, family, parts, 0.25)}
    assert {name: group["lr"] for name, group in groups.items()} == {"": 0.25, "connector": 0.5}
    assert sum(len(group["params"]) for group in groups.values()) == sum(p.requires_grad for p in module.parameters())
    connector = model.get_base_model().get_submodule(family.connector)
    assert [id(p) for p in groups["connector"]["params"]] == [id(p) for p in connector.parameters()]


def test_a_learning_rate_for_a_frozen_part_is_refused() -> None:
    tree = {"data": {"shards": "s"}, "model": {"base": "m"}, "run": {"dir": "r"}}
    with pytest.raises(RecipeError, match=r"parts\.tower: is frozen but has a learning_rate; remove it"):
        build_recipe({**tree, "parts": {"tower": {"learning_rate": 0.1}}}, [], "recipe")


@pytest.mark.parametrize(("task", "prompt"), [("dish", "{question}"), ("question", "이름은?")])
def test_a_prompt_that_does_not_fit_its_task_is_refused(task: str, prompt: str) -> None:
    tree = {"data": {"shards": "s", "task": task, "prompt": prompt}, "model": {"base": "m"}, "run": {"dir": "r"}}
    with pytest.raises(RecipeError, match=r"data\.prompt has (no )?\{question\}, "):
        build_recipe(tree, [], "recipe")


@pytest.mark.parametrize("way", ["lora", "full"])
def test_a_tower_whose_last_layers_get_no_gradient_stays_frozen(way: str) -> None:
    """LLaVA takes its features from an earlier layer of the tower, so its last layers get no gradient."""
    with pytest.raises(RecipeError, match=r"a LLaVA-1\.5's tower get no gradient → set parts\.tower=frozen"):
        require_parts_possible(FAMILIES["llava"], Parts.model_validate({"tower": way}))


@pytest.mark.parametrize(
    "changes",
    [
        {"patch_size": 7},
        {"num_additional_image_tokens": 0},
        {"vision_feature_select_strategy": "full"},
        {"image_processor": {"size": {"shortest_edge": 112}, "crop_size": {"height": 112, "width": 112}}},
    ],
    ids=str,
)
def test_a_processor_that_does_not_fit_its_model_is_refused_before_it_loads(tmp_path: Path, changes: dict) -> None:
    write_llava(tmp_path)
    path = tmp_path / "processor_config.json"
    settings = json.loads(path.read_text())
    for name, value in changes.items():
        settings[name] = {**settings[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"the processor of .* makes \d+ tokens and \d+ pixels .* takes 16 and 56"):
        pictures_of(tmp_path)


def test_lora_inside_a_fully_trained_tower_is_refused() -> None:
    """For one module, peft keeps either the full weights or the LoRA weights."""
    parts = Parts.model_validate({"tower": "full", "connector": "lora"})
    with pytest.raises(RecipeError, match=r"a Qwen2\.5-VL's connector is inside its tower → set parts\.connector"):
        require_parts_possible(FAMILIES["qwen2_5_vl"], parts)


def test_a_4_bit_part_cannot_be_fully_trained(base: Path) -> None:
    tree = {"data": {"shards": "s"}, "model": {"base": "m"}, "run": {"dir": "r"}}
    with pytest.raises(RecipeError, match=r"4-bit weights cannot train; set model\.quantization=none"):
        build_recipe(tree, ["parts.language_model=full"], "recipe")


def test_an_adapter_with_other_parts_is_refused(base: Path, tmp_path: Path) -> None:
    save_adapter(build(base, connector="full"), tmp_path, {"parts": Parts(connector="full").train_modes()})  # type: ignore[arg-type]
    tree = {"data": {"shards": "s"}, "model": {"base": "m", "adapter": str(tmp_path)}, "run": {"dir": "r"}}
    require_adapter(build_recipe({**tree, "parts": {"connector": "full"}}, [], "recipe"))
    with pytest.raises(ModelError, match=r"was trained with parts .*'connector': 'full'.* → set the adapter's parts"):
        require_adapter(build_recipe(tree, [], "recipe"))


_NAMED = ((Data, "task"), (Objective, "name"))


def test_a_recipe_allows_every_task_and_objective() -> None:
    """A recipe allows exactly the names in the tables."""
    tasks, objectives = (get_args(section.model_fields[key].annotation) for section, key in _NAMED)
    assert (set(tasks), set(objectives)) == (set(TASKS), set(OBJECTIVES))
    assert {"qwen2_5_vl", "qwen2_vl", "llava"} <= set(FAMILIES)
