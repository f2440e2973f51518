"""A base model's files are checked before a rank starts, and a complete model in the cache needs no network."""

import json
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from asking import adapted
from bases import cut, edit, publish, put_into_cache
from running import write_recipe

from kfood_dist.cli import main
from kfood_dist.config.recipe import load_recipe
from kfood_dist.doctor import checks as doctor
from kfood_dist.errors import KfoodError, ModelError
from kfood_dist.model import files
from kfood_dist.model.adapters import save_adapter
from kfood_dist.model.files import base_folder, find_faults, located, require_base
from kfood_dist.model.load import load_base
from kfood_dist.train.build import adapter_facts
from kfood_dist.train.preflight import preflight

CPU = torch.device("cpu")
NAME = "Someone/Tiny-VL"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 3976732664\n"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path, tiny_model: Path) -> Path:
    """Return the tiny model in two shards."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    cut(folder)
    return folder


SHARD = "model-00002-of-00002.safetensors"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def break_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8:12] = b"\xff\xff\xff\xff"
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        (SHARD, Path.unlink, f"lacks {SHARD}"),
        (SHARD, lambda path: path.write_bytes(b""), f"{SHARD} is empty"),
        (SHARD, lambda path: path.write_text(POINTER), f"{SHARD} is a git-lfs pointer"),
        (SHARD, truncate, f"{SHARD} is cut off or damaged"),
        (SHARD, append, f"{SHARD} is cut off or damaged"),
        (SHARD, break_header, f"{SHARD} is cut off or damaged"),
        (SHARD, lambda path: path.write_text("<html>404</html>"), f"{SHARD} is cut off or damaged"),
        (SHARD, lambda path: shutil.copy(path.with_name(SHARD.replace("2-", "1-", 1)), path), "which the index maps"),
        (INDEX, lambda path: path.write_text(POINTER), f"{INDEX} is a git-lfs pointer"),
        (INDEX, lambda path: path.write_text("{"), f"{INDEX} is damaged"),
        (INDEX, lambda path: path.write_text('{"weight_map": {}}'), f"{INDEX} names no tensors"),
        (INDEX, lambda path: path.write_text('{"weight_map": 5}'), f"{INDEX} is damaged"),
        (INDEX, Path.unlink, "lacks *.safetensors"),
        ("config.json", lambda path: path.write_bytes(b""), "config.json is empty"),
        ("tokenizer_config.json", Path.unlink, "lacks tokenizer_config.json"),
        ("tokenizer.json", Path.unlink, "lacks tokenizer.json"),
        ("tokenizer.json", lambda path: path.write_text(POINTER), "tokenizer.json is a git-lfs pointer"),
        ("preprocessor_config.json", Path.unlink, "lacks preprocessor_config.json"),
        ("chat_template.jinja", lambda path: path.write_bytes(b""), "chat_template.jinja is empty"),
        ("chat_template.json", lambda path: path.write_text(POINTER), "chat_template.json is a git-lfs pointer"),
    ],
)
def test_an_incomplete_file_is_reported_by_preflight_and_doctor(
    sharded: Path, tiny_shards: Path, tmp_path: Path, name: str, harm: Any, message: str
) -> None:
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", sharded, tiny_shards))
    preflight(recipe, 1)
    harm(sharded / name)
    with pytest.raises(ModelError) as caught:
        preflight(recipe, 1)
    assert message in caught.value.what
    assert "hf download" in caught.value.remedy and "git lfs pull" in caught.value.remedy
    (found,) = doctor.examine("model", lambda: doctor.check_model(str(sharded), tiny_shards))
    assert found.level == doctor.FAULT and message in found.what


@pytest.mark.parametrize("harm", [truncate, append, lambda path: path.write_text(POINTER), Path.unlink])
def test_a_single_weight_file_is_checked_like_shards(tmp_path: Path, tiny_model: Path, harm: Any) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    require_base(str(folder))
    harm(folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors is |lacks \*\.safetensors"):
        require_base(str(folder))


def test_many_missing_shards_are_reported_in_one_line(sharded: Path) -> None:
    names = [f"model-{i:05d}-of-00038.safetensors" for i in range(1, 39)]
    edit(sharded / INDEX, weight_map={f"t{i}": name for i, name in enumerate(names)})
    with pytest.raises(ModelError, match=r"lacks model-00001-of-00038\.safetensors, .* and 34 more → "):
        require_base(str(sharded))


def test_other_forms_of_the_small_files_count_as_complete(sharded: Path) -> None:
    """The vocabulary may be in its two old files, and the picture settings in processor_config.json."""
    model = json.loads((sharded / "tokenizer.json").read_text())["model"]
    (sharded / "vocab.json").write_text(json.dumps(model["vocab"]))
    (sharded / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    (sharded / "tokenizer.json").unlink()
    settings = json.loads((sharded / "preprocessor_config.json").read_text())
    (sharded / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    (sharded / "preprocessor_config.json").unlink()
    assert list(find_faults(sharded)) == []
    (sharded / "merges.txt").write_text("")
    assert [fault.name for fault in find_faults(sharded)] == ["merges.txt"]


def test_the_layout_of_the_hub_loads_to_the_same_model(tmp_path: Path, tiny_model: Path) -> None:
    """That is: old parameter names, a flat config, rope_scaling of type mrope, two shards and an index."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    publish(folder)
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    assert "visual.blocks.0.attn.qkv.weight" in names and "model.layers.0.mlp.up_proj.weight" in names
    require_base(str(folder))
    found, expected = (load_base(str(path), "none", "fp32", "sdpa", CPU) for path in (folder, tiny_model))
    tensors = dict(expected.named_parameters())
    assert tensors.keys() == dict(found.named_parameters()).keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.named_parameters())
    batch = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(found(input_ids=batch).logits, expected(input_ids=batch).logits)


# In the hub's cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Block the network. Yields the list of this process's attempts to use it."""
    asked: list[object] = []

    def refuse(*args: object, **options: object) -> None:
        asked.append(args)
        raise OSError(101, "Network is unreachable")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    yield asked


def test_a_complete_model_in_the_cache_uses_no_network(
    tiny_model, tiny_shards, tiny_adapter, pictures, tmp_path, cache, tried, capsys
) -> None:
    """Preflight, doctor, eval and predict read config, tokenizer, picture settings and weights only from the cache."""
    snapshot = put_into_cache(tiny_model, cache, NAME)
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", Path(NAME), tiny_shards))
    assert located(NAME) == str(snapshot) and base_folder(NAME) == snapshot
    preflight(recipe, 1)
    assert [found.level for found in doctor.check_model(NAME, tiny_shards)] == [doctor.OK]
    words = ["--model", NAME, "--adapter", str(tiny_adapter)]
    asked = ["eval", "--shards", str(tiny_shards), "--limit", "1", "--out", str(tmp_path / "out"), *words]
    assert main(asked) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["model"] == NAME
    assert main(["predict", str(next(pictures.rglob("Img_*"))), *words, "--alternatives", "0"]) == 0
    assert tried == [], capsys.readouterr()


def test_an_adapter_records_the_hub_name(tiny_model, tiny_shards, tmp_path, cache, tried) -> None:
    put_into_cache(tiny_model, cache, NAME)
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", Path(NAME), tiny_shards))
    model = adapted(Path(NAME))
    save_adapter(model, tmp_path / "adapter", adapter_facts(recipe, "squash"))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == NAME
    assert json.loads((tmp_path / "adapter" / "kfood.json").read_text())["base"] == NAME
    for path in (tmp_path / "adapter").iterdir():
        assert str(cache).encode() not in path.read_bytes(), path.name
    assert tried == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tokenizer.json", "tokenizer.json"),
        ("tokenizer_config.json", "tokenizer_config.json"),
        ("model.safetensors", "*.safetensors"),
        ("config.json", "config.json"),
        ("chat_template.jinja", "its chat template"),
    ],
)
def test_an_incomplete_cache_without_network_is_refused_with_a_remedy(tiny_model, cache, tried, name, message) -> None:
    snapshot = put_into_cache(tiny_model, cache, NAME)
    (snapshot / name).resolve().unlink()  # the link stays, as when only the links were copied
    assert base_folder(NAME) is None and located(NAME) == NAME
    with pytest.raises(ModelError) as caught:
        require_base(NAME)
    assert f"in the hub cache ({snapshot}) is incomplete: lacks {message}" in caught.value.what
    assert f"`hf download {NAME}`" in caught.value.remedy


def test_the_remedy_for_a_damaged_cached_file_is_a_new_download(tiny_model, cache, tried) -> None:
    """The hub's client would treat the file as complete."""
    snapshot = put_into_cache(tiny_model, cache, NAME)
    truncate((snapshot / "model.safetensors").resolve())
    with pytest.raises(ModelError, match=rf"hf download {NAME} model.safetensors --force-download"):
        require_base(NAME)
    assert tried == []


def test_a_hub_that_never_answers_ends_in_a_timeout(cache, monkeypatch) -> None:
    monkeypatch.setattr(files, "HUB_TIMEOUT_S", 0.05)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **options: time.sleep(5))
    with pytest.raises(ModelError, match="neither a folder here, nor in the hub cache, nor reachable on the hub"):
        require_base(NAME)


def test_a_file_that_the_hub_can_provide_is_only_a_warning(tiny_model, cache, monkeypatch) -> None:
    snapshot = put_into_cache(tiny_model, cache, NAME)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **options: None)
    (snapshot / "model.safetensors").unlink()
    require_base(NAME)
    (found,) = doctor.check_model(NAME, None)
    assert (found.level, found.remedy) == (doctor.WARN, f"hf download {NAME}, or let training download it")


@pytest.mark.parametrize("name", ["a/b/c", "owner/..", "a b/c\0d", "x" * 300 + "/y"])
def test_invalid_model_names_are_refused(cache, tried, name) -> None:
    assert base_folder(name) is None
    with pytest.raises(KfoodError):
        require_base(name)
