"""The recipe: refused values, their messages, and values that survive saving and loading."""

import json
import re
from pathlib import Path

import pytest
import yaml

from kfood_dist.config.recipe import load_recipe, save_recipe
from kfood_dist.config.sections import Part
from kfood_dist.errors import RecipeError

MINIMAL = "data: {shards: s}\nmodel: {base: m}\nrun: {dir: r}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_defaults_are_the_documented_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout) == (16, 32, 0.05)
    assert recipe.train.gradient_accumulation_steps == 8
    assert recipe.data.max_length == 1536
    assert (recipe.data.image_size, recipe.model.quantization, recipe.optim.name) == (224, "nf4", "adamw8bit")


def test_all_faults_are_reported_at_once_with_their_fixes(tmp_path: Path) -> None:
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


def test_a_micro_batch_too_large_for_any_machine_is_refused(tmp_path: Path) -> None:
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
def test_a_file_that_is_not_a_recipe_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
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


TYPED = (
    "runs/try #2", "#2", "010", "2024-01-01", "1_000", "1e3", "12", "a: b", "yes", "true", "null", "[x]", "{x", "*x",
    "!x", "&x y", "a 'b' c", "'a' and 'b'", " 이름은? ", "첫 줄\n둘째 줄",
)  # fmt: skip


@pytest.mark.parametrize("typed", TYPED)
def test_a_text_key_takes_what_was_typed(tmp_path: Path, typed: str) -> None:
    """This holds for `--set`, for a saved recipe, and for quoted text in a file."""
    recipe = load_recipe(write(tmp_path, MINIMAL), [f"run.dir={typed}", f"data.prompt={typed}", f"data.shards={typed}"])
    assert (recipe.run.dir, recipe.data.prompt, recipe.data.shards) == (Path(typed), typed, typed)
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe
    assert yaml.safe_load((tmp_path / "saved.yaml").read_text())["data"]["prompt"] == typed  # for other YAML readers
    mixed = load_recipe(write(tmp_path, MINIMAL), [f"data.mix=[{{shards: {json.dumps(typed)}}}]"])
    assert mixed.data.mix[0].shards == typed


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ('"a #b: \\n"', "a #b: \n"),
        ("'it''s'", "it's"),
        ('"010"', "010"),
        ("'첫 줄\n둘째 줄'", "첫 줄\n둘째 줄"),
        ('"첫 줄\n둘째 줄"', "첫 줄\n둘째 줄"),
    ],
)
def test_quotes_around_the_complete_text_are_removed(tmp_path: Path, typed: str, value: str) -> None:
    assert load_recipe(write(tmp_path, MINIMAL), [f"data.prompt={typed}"]).data.prompt == value


def test_null_unsets_a_key_that_has_no_value_by_default(tmp_path: Path) -> None:
    text = MINIMAL.replace("base: m", "base: m, adapter: a") + "train: {max_steps: 5, deepspeed_config: ds.json}\n"
    nulls = ["model.adapter=null", "train.max_steps=null", "train.deepspeed_config=null"]
    recipe = load_recipe(write(tmp_path, text), nulls)
    assert (recipe.model.adapter, recipe.train.max_steps, recipe.train.deepspeed_config) == (None, None, None)
    assert load_recipe(write(tmp_path, text), ['model.adapter="null"']).model.adapter == Path("null")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("train.max_steps=010", "train.max_steps: 010 may be read as octal; write the number without the leading 0"),
        ("train.zero_stage=02", "02 may be read as octal"),
        ("optim.learning_rate=01e-4", "01e-4 may be read as octal"),
        ("data.mix=[{shards: a, weight: 010}]", "data.mix.0.weight: 010 may be read as octal"),
        ("train.max_steps=1:30", "valid integer, unable to parse string as an integer, not '1:30'"),
        ("optim.learning_rate=1:30", "not '1:30'"),
        ("train.max_steps=0x10", "not '0x10'"),
        ("train.max_steps=2024-01-01", "not '2024-01-01'"),
        ("train.max_steps=yes", "not 'yes'"),
        ("train.max_steps=true", "train.max_steps: a number is needed, not true"),
        ("train.max_steps=5 # five", "` #` begins a comment in YAML; leave it out, or put quotes around the text"),
        ("lora.target_modules=[q_proj] #x", "` #` begins a comment in YAML"),
        ("data.mix=[{shards: try #2}]", "YAML ends the text at `try`, because ` #` begins a comment"),
        (
            "lora.target_modules=[10]",
            "a text is needed, but YAML reads the number 10; put quotes around all of it",
        ),
        ("model.quantization=nf4 # x", "not 'nf4 # x'"),
        ('run.dir="\\q"', "the value is not YAML; put quotes"),
        ("train.max_steps=", "there is no value; write null for none"),
        ("model.adapter=", "there is no value; write null for none"),
        ("train.seed=", "there is no value; write one after ="),
        ("run.dir=", "there is no value; write one after ="),
        ("run.dir=''", "run.dir: is empty; name a folder"),
        ("data.prompt=", "data.prompt: string should have at least 1 character"),
        ("train.max_step=", "train.max_step: no such key; did you mean max_steps?"),
    ],
)
def test_an_ambiguous_value_is_refused(tmp_path: Path, override: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(complaint)):
        load_recipe(write(tmp_path, MINIMAL), [override])


def test_an_unambiguous_number_or_truth_value_is_accepted(tmp_path: Path) -> None:
    overrides = ["train.max_steps=1_000", "optim.eps=1e-5", "train.gradient_checkpointing=no", "data.system="]
    recipe = load_recipe(write(tmp_path, MINIMAL), [*overrides, "run.dir = runs/x", "train.epochs = 3"])
    assert (recipe.train.max_steps, recipe.optim.eps, recipe.train.gradient_checkpointing) == (1000, 1e-5, False)
    assert (recipe.data.system, recipe.run.dir, recipe.train.epochs) == ("", Path("runs/x"), 3)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (
            "dir: runs/try #2",
            "line 4: YAML ends the text at `runs/try`, because ` #` begins a comment → put quotes around",
        ),
        ("dir: 12", "run.dir: a text is needed, but YAML reads the number 12; put quotes around all of it"),
        ("dir: 1e3", "YAML reads the number 1000.0; put quotes"),
        ("dir: true", "YAML reads the truth value true; put quotes"),
        ("dir: null", "YAML reads nothing (null); put quotes"),
        ("dir:", "YAML reads nothing (null); put quotes"),
        ("dir: [x]", "YAML reads a list ['x']; put quotes"),
        ("dir: {x: y}", "YAML reads a section {'x': 'y'}; put quotes"),
        ("dir: a: b", "is not YAML (mapping values are not allowed here"),
        ("dir: ''", "run.dir: is empty; name a folder"),
        ("dir: r\n  log_every_steps: 2\n  dir: s", "`dir` is given twice"),
        ("dir: r\nmodel: {base: other}", "`model` is given twice"),
        ("dir: r\ntrain: {max_steps: 010}", "train.max_steps: 010 may be read as octal"),
    ],
)
def test_a_text_in_a_file_that_yaml_reads_differently_is_refused(tmp_path: Path, line: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(complaint)):
        load_recipe(write(tmp_path, MINIMAL.replace("{dir: r}", f"\n  {line}")))


@pytest.mark.parametrize(
    ("line", "value"),
    [
        *((f"dir: {text}", text) for text in ("010", "2024-01-01", "1_000", "yes", "off", "0x10", "1:30")),
        ("dir: runs/x # where it goes", "runs/x"),
        ("dir: runs/x   #", "runs/x"),
        ("dir: 'runs/try #2' #this", "runs/try #2"),
    ],
)
def test_a_text_in_a_file_stays_as_written(tmp_path: Path, line: str, value: str) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL.replace("{dir: r}", f"\n  {line}") + "train: {max_steps: 5} #five\n"))
    assert (recipe.run.dir, recipe.train.max_steps) == (Path(value), 5)


@pytest.mark.parametrize("value", [".inf", ".nan", "-1", "fast"])
def test_a_learning_rate_must_be_a_positive_number(tmp_path: Path, value: str) -> None:
    with pytest.raises(RecipeError, match=r"optim\.learning_rate"):
        load_recipe(write(tmp_path, MINIMAL), [f"optim.learning_rate={value}"])


def test_zero_stage_0_with_a_deepspeed_config_is_a_conflict(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="trains without DeepSpeed"):
        load_recipe(write(tmp_path, MINIMAL), ["train.zero_stage=0", "train.deepspeed_config=ds_configs/zero2.json"])


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_flash_attention_needs_bf16(tmp_path: Path, precision: str) -> None:
    """It would fail at the first step, after the model is loaded."""
    flash = "model.attention=flash_attention_2"
    message = (
        r"model: flash_attention_2 does not support float32, and .*; set model.precision=bf16, or model.attention=sdpa"
    )
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, MINIMAL), [flash, f"model.precision={precision}"])
    assert load_recipe(write(tmp_path, MINIMAL), [flash]).model.attention == "flash_attention_2"


def test_a_saved_recipe_reads_back_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL), ["train.max_steps=5"])
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe


def test_a_recipe_overrides_the_keys_of_the_recipe_it_extends(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL + "optim: {learning_rate: 0.5, eps: 0.1}\n")
    (tmp_path / "sub").mkdir()
    upper = tmp_path / "sub" / "upper.yaml"
    upper.write_text("extends: ../recipe.yaml\noptim: {learning_rate: 0.25}\nrun: {dir: q}\n")
    recipe = load_recipe(upper, ["optim.beta1=0.5"])
    assert (recipe.optim.learning_rate, recipe.optim.eps, recipe.optim.beta1) == (0.25, 0.1, 0.5)
    assert (recipe.data.shards, recipe.run.dir) == ("s", Path("q"))


def test_a_key_within_a_key_is_set_and_extended(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL + "parts: {connector: {train: full, learning_rate: 0.5}}\n")
    (upper := tmp_path / "upper.yaml").write_text("extends: recipe.yaml\nparts: {connector: {learning_rate: 0.25}}\n")
    assert load_recipe(upper).parts.connector == Part(train="full", learning_rate=0.25)
    assert load_recipe(upper, ["parts.connector.learning_rate=1.0e-3"]).parts.connector.learning_rate == 1e-3
    both = ["parts.tower.train=lora", "parts.tower.learning_rate=1.0e-3"]
    assert load_recipe(upper, both).parts.tower == Part(train="lora", learning_rate=1e-3)
    with pytest.raises(RecipeError, match="connector is 'full', which has no keys; set all of connector"):
        load_recipe(upper, ["parts.connector=full", "parts.connector.learning_rate=1.0e-3"])
    with pytest.raises(RecipeError, match=r"parts.connector.rate: no such key"):
        load_recipe(upper, ["parts.connector.rate=1"])
    with pytest.raises(RecipeError, match="there is no value; write null for none"):
        load_recipe(upper, ["parts.connector.learning_rate="])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("extends: recipe.yaml\n", "extends itself"),
        ("extends: [a]\n", r"has `extends: \['a'\]`"),
        ("extends: none.yaml\n", r"none.yaml cannot be read"),
    ],
)
def test_an_invalid_extends_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        load_recipe(write(tmp_path, text + MINIMAL))


def test_the_shipped_stages_differ_in_learning_rate_data_and_adapter() -> None:
    folder = Path(__file__).parents[2] / "launch" / "recipes"
    base = load_recipe(folder / "qwen2.5-vl-3b.yaml")
    stages = [load_recipe(folder / "stages" / f"{n}.yaml") for n in (1, 2, 3)]
    assert [s.optim.learning_rate for s in stages] == [8e-5, 5e-5, 2e-5]
    assert len({s.data.shards for s in stages} | {base.data.shards}) == 4
    assert [s.model.adapter for s in stages] == [None, *(s.run.dir / "adapter" for s in stages[:2])]
    assert all(s.lora == base.lora and s.train == base.train for s in stages)


def test_a_tilde_is_expanded_in_every_folder_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/chef")
    text = "data: {shards: ~/s, mix: [{shards: ~/t}]}\nmodel: {base: ~/m, adapter: ~/a}\nrun: {dir: ~nobody-here/r}\n"
    recipe = load_recipe(write(tmp_path, text))
    assert (recipe.data.shards, recipe.data.mix[0].shards, recipe.model.base) == (
        "/home/chef/s", "/home/chef/t", "/home/chef/m",
    )  # fmt: skip
    assert (recipe.model.adapter, recipe.run.dir) == (Path("/home/chef/a"), Path("~nobody-here/r"))
    monkeypatch.delenv("HOME")
    assert load_recipe(write(tmp_path, MINIMAL), ["data.shards=s3://bucket/s"]).data.shards == "s3://bucket/s"
