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


def test_a_recipe_holds_what_differs_from_the_one_it_extends(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL + "optim: {learning_rate: 0.5, eps: 0.1}\n")
    (tmp_path / "sub").mkdir()
    upper = tmp_path / "sub" / "upper.yaml"
    upper.write_text("extends: ../recipe.yaml\noptim: {learning_rate: 0.25}\nrun: {dir: q}\n")
    recipe = load_recipe(upper, ["optim.beta1=0.5"])
    assert (recipe.optim.learning_rate, recipe.optim.eps, recipe.optim.beta1) == (0.25, 0.1, 0.5)
    assert (recipe.data.shards, recipe.run.dir) == ("s", Path("q"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("extends: recipe.yaml\n", "extends itself"),
        ("extends: [a]\n", r"has `extends: \['a'\]`"),
        ("extends: none.yaml\n", r"none.yaml cannot be read"),
    ],
)
def test_a_recipe_extends_one_other(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        load_recipe(write(tmp_path, text + MINIMAL))


def test_the_stages_differ_in_what_they_say() -> None:
    folder = Path(__file__).parents[2] / "launch" / "recipes"
    base = load_recipe(folder / "qwen2.5-vl-3b.yaml")
    stages = [load_recipe(folder / "stages" / f"{n}.yaml") for n in (1, 2, 3)]
    assert [s.optim.learning_rate for s in stages] == [8e-5, 5e-5, 2e-5]
    assert len({s.data.shards for s in stages} | {base.data.shards}) == 4
    assert [s.model.adapter for s in stages] == [None, *(s.run.dir / "adapter" for s in stages[:2])]
    assert all(s.lora == base.lora and s.train == base.train for s in stages)


def test_a_home_is_expanded_wherever_a_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/chef")
    text = "data: {shards: ~/s, mix: [{shards: ~/t}]}\nmodel: {base: ~/m, adapter: ~/a}\nrun: {dir: ~nobody-here/r}\n"
    recipe = load_recipe(write(tmp_path, text))
    assert (recipe.data.shards, recipe.data.mix[0].shards, recipe.model.base) == (
        "/home/chef/s", "/home/chef/t", "/home/chef/m",
    )  # fmt: skip
    assert (recipe.model.adapter, recipe.run.dir) == (Path("/home/chef/a"), Path("~nobody-here/r"))
    monkeypatch.delenv("HOME")
    assert load_recipe(write(tmp_path, MINIMAL), ["data.shards=s3://bucket/s"]).data.shards == "s3://bucket/s"
