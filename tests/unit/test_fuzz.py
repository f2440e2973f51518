"""Damaged and hostile manifests, indexes and recipes end in a KfoodError with a remedy, never in a traceback or a hang.

Bytes are flipped, cut off, inserted, erased and repeated. Values in JSON, index rows and YAML are changed too, with new
checksums, so that the checks behind the checksums are reached.
"""

import contextlib
import hashlib
import io
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import write_folder

from kfood_dist.config.recipe import load_recipe
from kfood_dist.data.shards.manifest import load_manifest, with_checksum
from kfood_dist.data.shards.reader import INDEX_DTYPE, open_split
from kfood_dist.data.shards.sample import Sample, cut
from kfood_dist.data.shards.tars import Entry, write_tar
from kfood_dist.data.shards.verify import verify
from kfood_dist.errors import KfoodError, RecipeError, ShardError
from kfood_dist.pack.job import pack
from kfood_dist.pack.options import PackOptions
from kfood_dist.pack.split import parse_fractions

INDEX = "train-000000.index.npy"
# An example takes milliseconds, so half a minute is a hang, even on a busy machine.
fuzzing = settings(
    max_examples=3 * settings().max_examples,
    deadline=30_000,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packed")
    options = replace(PackOptions(), image_size=16, shard_size=3, workers=1, fractions=parse_fractions("0.6,0,0.4"))
    pack(write_folder(root / "source", {"구이/불고기": 3, "한과/약과": 3}), root / "out", options)
    return root / "out"


@pytest.fixture(scope="module")
def folder(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy. Each example replaces its manifest or an index."""
    return shutil.copytree(packed, tmp_path_factory.mktemp("fuzzed") / "out")


def use(folder: Path) -> None:
    """Call everything that reads a packed folder. Only KfoodError may be raised, and verify only returns findings."""
    for split in ("train", "test"):
        try:
            shards = open_split(folder, split)
            shards.require_files()
            found = shards.read_many(range(len(shards)))
            assert all(isinstance(data, Sample | ShardError) for data in found)
            assert [shards.key(i) for i in range(min(3, len(shards)))]
            shards.will_need(range(len(shards)))
            shards.labels()
        except KfoodError as error:
            assert error.what and error.remedy
    assert isinstance(verify(folder, show_progress=False), list)


# Bytes

mutations = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "insert", "erase", "double"]), st.floats(0, 1), st.binary(max_size=12)),
    min_size=1,
    max_size=4,
)


def mutated(data: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, place, extra in changes:
        at = int(place * max(0, len(data) - 1))
        if kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ (extra[0] if extra and extra[0] else 1)]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + extra + data[at:]
        elif kind == "erase":
            data = data[:at] + data[at + 1 + len(extra) :]
        else:
            data = data[:at] + data[at // 2 :]
    return data


@fuzzing
@given(changes=mutations)
def test_changed_manifest_bytes_are_refused(
    packed: Path, folder: Path, changes: list[tuple[str, float, bytes]]
) -> None:
    original = (packed / "manifest.json").read_bytes()
    damaged = mutated(original, changes)
    (folder / "manifest.json").write_bytes(damaged)
    if damaged != original:
        with pytest.raises(ShardError, match="→"):
            load_manifest(folder)
    use(folder)


@fuzzing
@given(changes=mutations, named=st.booleans())
def test_changed_index_bytes_raise_only_our_errors(
    packed: Path, folder: Path, changes: list[tuple[str, float, bytes]], named: bool
) -> None:
    put_index(packed, folder, mutated((packed / INDEX).read_bytes(), changes), named)
    use(folder)


def put_index(packed: Path, folder: Path, data: bytes, named: bool = True) -> None:
    """Write an index, and a manifest that matches it if `named`."""
    (folder / INDEX).write_bytes(data)
    manifest = json.loads((packed / "manifest.json").read_text(encoding="utf-8"))
    if named:
        manifest["shards"][0]["index"].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (folder / "manifest.json").write_bytes(with_checksum(manifest))


# Values

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=True)
    | st.text(max_size=8)
    | st.sampled_from(["..", "../up", "/etc/passwd", "a\0b", "train-000000.tar", "x" * 5000, "\ud800", "1e999"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return every place in a JSON or YAML tree."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path] * bool(path) + [place for key, child in children for place in places(child, (*path, key))]


def changed(tree: Any, place: tuple[Any, ...], value: Any, gone: bool) -> Any:
    here = tree
    for key in place[:-1]:
        here = here[key]
    if gone:
        del here[place[-1]]
    else:
        here[place[-1]] = value
    return tree


def encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
        return True
    except UnicodeEncodeError:
        return False


@fuzzing
@given(data=st.data(), value=json_values.filter(encodable), gone=st.booleans())
def test_changed_manifest_values_with_a_correct_checksum_raise_only_our_errors(
    packed: Path, folder: Path, data: st.DataObject, value: Any, gone: bool
) -> None:
    shutil.copy(packed / INDEX, folder / INDEX)
    manifest = json.loads((packed / "manifest.json").read_text(encoding="utf-8"))
    place = data.draw(st.sampled_from(places(manifest)))
    (folder / "manifest.json").write_bytes(with_checksum(changed(manifest, place, value, gone)))
    use(folder)


fields = st.sampled_from([name for name in INDEX_DTYPE.names or () if name != "key"])


@fuzzing
@given(row=st.integers(0, 2), field=fields, share=st.floats(0, 1), key=st.binary(max_size=24))
def test_changed_index_values_with_a_correct_checksum_raise_only_our_errors(
    packed: Path, folder: Path, row: int, field: str, share: float, key: bytes
) -> None:
    index = np.load(packed / INDEX).copy()
    most = np.iinfo(INDEX_DTYPE[field]).max
    index[field][row % len(index)] = min(most, math.floor(share * most))
    index["key"][row % len(index)] = key
    put_index(packed, folder, saved(index))
    use(folder)


def saved(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def other_indexes(index: np.ndarray) -> dict[str, bytes]:
    huge = saved(index).replace(f"({len(index)},)".encode(), b"(9,)")
    return {
        "objects": saved(np.array([{"a": 1}], dtype=object), allow_pickle=True),
        "another dtype": saved(index["offset"]),
        "big-endian": saved(index.astype(INDEX_DTYPE.newbyteorder(">"))),
        "two axes": saved(np.stack([index, index])),
        "Fortran order": saved(np.asfortranarray(np.stack([index, index]))),
        "no rows": saved(index[:0]),
        "a scalar": saved(index[0]),
        "more rows than bytes": huge,
        "a header of millions of rows": huge.replace(b"(9,)", b"(9999999999999,)"),
        "a negative shape": huge.replace(b"(9,)", b"(-3,)"),
        "a header that is code": b"\x93NUMPY\x01\x00\x46\x00" + b"__import__('os').abort()".ljust(69) + b"\n",
        "a header without end": b"\x93NUMPY\x03\x00\xff\xff\xff\x7f{",
        "a deep header": b"\x93NUMPY\x01\x00\x60\xea" + b"(" * 60000,
        "a zip": b"PK\x05\x06" + b"\0" * 18,
        "nothing": b"",
    }


@pytest.mark.parametrize("kind", other_indexes(np.zeros(3, INDEX_DTYPE)))
def test_a_file_that_is_not_an_index_is_refused(packed: Path, folder: Path, kind: str) -> None:
    put_index(packed, folder, other_indexes(np.load(packed / INDEX))[kind])
    with pytest.raises(ShardError, match=r"index\.npy .* → "):
        open_split(folder, "train").read(0)
    use(folder)


def test_an_index_that_declares_terabytes_takes_little_memory(packed: Path, folder: Path) -> None:
    """The index is read in a new process, which may use at most 2 GiB."""
    index = np.load(packed / INDEX).copy()
    index["size"] = 2**32 - 1
    index["offset"] = 2**63
    for data in (saved(index), other_indexes(index)["a header of millions of rows"]):
        put_index(packed, folder, data)
        code = (
            "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30));"
            "from kfood_dist.data.shards.reader import open_split;"
            "print(open_split(sys.argv[1], 'train').read_many([0, 1]))"
        )
        done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "ShardError" in done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the bytes of a sample of two pictures."""
    tar = tmp_path_factory.mktemp("run") / "a.tar"
    write_tar(tar, [Entry("train-00000000", (b"one", b"two"), b'{"label": "x"}', 0, 0, 1)])
    return tar.read_bytes()[: 6 * 512]


@fuzzing
@given(changes=mutations, place=st.integers(0, 6 * 512 - 1), digits=st.binary(min_size=1, max_size=12))
def test_changed_sample_bytes_with_a_correct_checksum_raise_only_expected_errors(
    run: bytes, changes: list[tuple[str, float, bytes]], place: int, digits: bytes
) -> None:
    """Another program may have written any bytes, also a changed tar header with a correct checksum."""
    assert len(cut("train-00000000", run).pictures) == 2
    header = place - place % 512
    damaged = bytearray(run[:place] + digits + run[place + len(digits) :])
    summed = sum(damaged[header : header + 512]) - sum(damaged[header + 148 : header + 156]) + 8 * 32
    resealed = damaged[: header + 148] + b"%06o\0 " % summed + damaged[header + 156 :]
    for data in (mutated(run, changes), bytes(resealed)):
        with contextlib.suppress(ValueError, RecursionError):  # a reader of samples expects these errors
            assert isinstance(cut("train-00000000", data), Sample)


# Recipes

RECIPE: dict[str, Any] = {
    "data": {"shards": "shards", "mix": [{"shards": "more", "weight": 2}], "prompt": "이름은?", "max_length": 512},
    "model": {"base": "model", "quantization": "nf4"},
    "lora": {"r": 16, "dropout": 0.05, "target_modules": ["q_proj"]},
    "optim": {"learning_rate": 1e-4},
    "train": {"zero_stage": 2, "seed": 3},
    "eval": {"every_steps": 5},
    "run": {"dir": "runs/x"},
}


def load(path: Path, *overrides: str) -> None:
    """Load a recipe. It must load, or raise one RecipeError with a remedy."""
    try:
        load_recipe(path, overrides)
    except RecipeError as error:
        assert error.what and error.remedy
        str(error).encode("utf-8", "surrogateescape")


@fuzzing
@given(changes=mutations)
def test_changed_recipe_bytes_raise_only_recipe_error(tmp_path: Path, changes: list[tuple[str, float, bytes]]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(mutated(yaml.safe_dump(RECIPE, allow_unicode=True).encode("utf-8"), changes))
    load(path)


@fuzzing
@given(data=st.data(), value=json_values.filter(encodable), gone=st.booleans())
def test_changed_recipe_values_raise_only_recipe_error(
    tmp_path: Path, data: st.DataObject, value: Any, gone: bool
) -> None:
    path = tmp_path / "recipe.yaml"
    tree = json.loads(json.dumps(RECIPE))
    tree = changed(tree, data.draw(st.sampled_from(places(tree))), value, gone)
    path.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML, and json.dumps keeps NaN and infinity
    load(path)


@fuzzing
@given(text=st.text(max_size=30), key=st.sampled_from(["", "train.seed=", "data.mix=", "data=", "x.y=", "run.dir.z="]))
def test_random_overrides_raise_only_recipe_error(tmp_path: Path, text: str, key: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE, allow_unicode=True), encoding="utf-8")
    load(path, key + text)


def laughs(depth: int) -> str:
    """Return YAML in which each line repeats the line before ten times: few bytes expand to 10 ** `depth` items."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, depth)]
    return "\n".join(lines) + f"\ndata: {{shards: *a{depth - 1}, mix: *a{depth - 1}}}\n"


HOSTILE: dict[str, str | bytes] = {
    "a billion laughs": laughs(9),
    "a map that holds itself": "data: &d {shards: s, mix: [*d]}\nmodel: {base: b}\nrun: {dir: r}\n",
    "a list that holds itself": "data: {shards: s, mix: &m [*m]}\nmodel: {base: b}\nrun: {dir: r}\n",
    "a Python object": "data: !!python/object/apply:os.system ['true']\n",
    "ten thousand digits": f"train: {{seed: {'9' * 10_000}}}\n",
    "a very long text": f"data: {{prompt: '{'가' * 300_000}'}}\n",
    "deep nesting": "[" * 50_000,
    "deep blocks": "".join(" " * n + "a:\n" for n in range(2_000)),
    "tabs": "data:\n\tshards: s\n",
    "a key twice": "data: {shards: a, shards: b}\nmodel: {base: b}\nrun: {dir: r}\n",
    "a merge": "data: {<<: {shards: a}, <<: [1]}\n",
    "a date": "data: {shards: 2026-11-21}\nmodel: {base: 2026-11-21}\nrun: {dir: 1}\n",
    "a key that is a list": "? [1, 2]\n: {a: b}\n",
    "a key that is a number": "data: {1: 2, null: 3, true: 4}\n",
    "a section that is a number": "1: {a: b}\nnull: {}\n",
    "infinity": "optim: {learning_rate: .inf}\ntrain: {seed: .nan}\n",
    "a NUL in a path": 'data: {shards: "a\\0b"}\nmodel: {base: "\\0"}\nrun: {dir: "\\0"}\n',
    "not UTF-8": b"data: \xff\xfe\n",
    "UTF-16": "data: {shards: a}".encode("utf-16"),
    "several documents": "data: {}\n---\ndata: {}\n",
    "nothing": "",
    "a text": "recipe",
    "sexagesimal": "train: {seed: 1:30, max_steps: 0o17, epochs: 1_000}\n",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_recipe_raises_only_recipe_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "recipe.yaml"
    text = HOSTILE[kind]
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    load(path)
    load(path, "train.seed=1", "data.mix=[]")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", ["[" * 5000, "&a [*a]", "!!python/name:os.system", "9" * 10_000, "\x00", "{a: b: c}"])
def test_a_hostile_override_raises_only_recipe_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE, allow_unicode=True), encoding="utf-8")
    for key in ("train.seed", "data.mix", "data.prompt", "nowhere.x"):
        load(path, f"{key}={text}")


def test_the_unchanged_recipe_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE, allow_unicode=True), encoding="utf-8")
    assert load_recipe(path).train.seed == 3


def test_the_unchanged_folder_is_valid(packed: Path) -> None:
    assert verify(packed) == []
    use(packed)
