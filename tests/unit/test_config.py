"""The recipe: what is refused, how it is said, and what survives a round trip."""

from pathlib import Path

import pytest

from kfood_dist.config import load_recipe, save_recipe
from kfood_dist.errors import RecipeError

MINIMAL = "data: {shards: s}\nmodel: {base: m}\nrun: {dir: r}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_the_stated_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout) == (16, 32, 0.05)
    assert recipe.train.gradient_accumulation_steps == 8
    assert recipe.data.max_length == 1536
    assert (recipe.data.image_size, recipe.model.quantization, recipe.optim.name) == (224, "nf4", "adamw8bit")


def test_all_faults_are_reported_together_with_their_fix(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {shard: x, image_size: abc}\nmodel: {base: m}\nrun: {dir: r}\ntrainn: {a: 1}\n")
    with pytest.raises(RecipeError) as raised:
        load_recipe(path, ["train.zero_stage=7", "nonsense"])
    text = str(raised.value)
    assert "6 faults" in text
    for part in (
        "data.shard: no such key; did you mean shards?",
        "data.shards: missing",
        "data.image_size: input should be a valid integer",
        "trainn: no such key; did you mean train?",
        "train.zero_stage: input should be 0, 1, 2 or 3, not 7",
        "--set nonsense: write it as section.key=value",
    ):
        assert part in text


def test_a_micro_batch_that_no_machine_holds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train.micro_batch_size: input should be less than or equal to 65536"):
        load_recipe(write(tmp_path, MINIMAL), ["train.micro_batch_size=1000000000000"])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "does not hold sections"),
        ("- a\n- b\n", "does not hold sections"),
        ("data: 3\n", "does not hold sections"),
        ("data: {shards: s", "is not YAML"),
        ("\x00\x01", "is not YAML"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        load_recipe(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml cannot be read"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_overrides_apply_in_order_and_take_yaml_values(tmp_path: Path) -> None:
    overrides = ["train.max_steps=5", "train.max_steps=7", "optim.learning_rate=1e-4", 'data.prompt="이름은: 무엇?"']
    recipe = load_recipe(write(tmp_path, MINIMAL), overrides)
    assert recipe.train.max_steps == 7
    assert recipe.optim.learning_rate == 1e-4
    assert recipe.data.prompt == "이름은: 무엇?"


@pytest.mark.parametrize("value", [".inf", ".nan", "-1", "fast"])
def test_a_learning_rate_must_be_a_positive_number(tmp_path: Path, value: str) -> None:
    with pytest.raises(RecipeError, match=r"optim\.learning_rate"):
        load_recipe(write(tmp_path, MINIMAL), [f"optim.learning_rate={value}"])


def test_zero_stage_0_with_a_deepspeed_config_is_a_conflict(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="trains without DeepSpeed"):
        load_recipe(write(tmp_path, MINIMAL), ["train.zero_stage=0", "train.deepspeed_config=ds_configs/zero2.json"])


def test_a_saved_recipe_reads_back_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL), ["train.max_steps=5"])
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe
