"""`kfood eval` in one process: its settings, its output, the reuse of reports, and refusals before weights load."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kfood_dist.cli import build_parser, main
from kfood_dist.data.batch.collate import Batch, StreamingCollator, targets_of
from kfood_dist.data.picture.images import decode_rgb, prepare_jpeg
from kfood_dist.data.plan.plan import MicroBatch
from kfood_dist.data.shards.reader import ShardSplit, open_split
from kfood_dist.data.task.table import require_columns
from kfood_dist.errors import RecipeError
from kfood_dist.evaluate import panel
from kfood_dist.evaluate import rank as ask
from kfood_dist.evaluate.evaluation import Evaluation, check, find_earlier
from kfood_dist.evaluate.generate import Answerer, load_answerer
from kfood_dist.evaluate.main import write_results
from kfood_dist.evaluate.metrics import Prediction
from kfood_dist.evaluate.settings import Settings, resolve_settings
from kfood_dist.model.objective.answer import AnswerLoss
from kfood_dist.model.processor import build_template
from kfood_dist.system.world import World

EXACT = ("--set", "model.quantization=none", "--set", "model.precision=fp32")


@pytest.fixture
def words(tiny_shards: Path, tiny_model: Path, tiny_adapter: Path, tmp_path: Path) -> list[str]:
    """Return the command line that evaluates the tiny adapter into tmp_path/out."""
    named = {"shards": tiny_shards, "model": tiny_model, "adapter": tiny_adapter, "out": tmp_path / "out"}
    return ["eval", *(word for name, value in named.items() for word in (f"--{name}", str(value)))]


def parse(words: list[str]):
    return build_parser("eval").parse_args(words)


def load(words: list[str]) -> tuple[Evaluation, Answerer, StreamingCollator]:
    task = check(parse(words))
    template = build_template(task.model, task.settings, task.adapter)
    device = torch.device("cpu")
    answerer = load_answerer(task.settings, template, task.model, task.adapter, device, task.max_new_tokens)
    return task, answerer, StreamingCollator(task.shards, template, task.task, for_generation=True)


def micro_batch(*ids: int) -> MicroBatch:
    return MicroBatch(0, 0, ids, 0)


def read(folder: Path) -> tuple[dict, list[dict]]:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return report, [json.loads(line) for line in lines]


def test_an_evaluation_writes_report_predictions_page_and_tensorboard(words, tiny_shards, tmp_path, capsys):
    assert main([*words, "--tensorboard", str(tmp_path / "tb"), "--step", "7"]) == 0
    report, records = read(tmp_path / "out")
    shards = open_split(tiny_shards, "test")
    assert [r["key"] for r in records] == [shards.key(i) for i in range(len(shards))]
    assert [r["source"] for r in records] == [shards.read(i).columns["sources"][0] for i in range(len(shards))]
    assert report["images"] == len(shards) == sum(row["images"] for row in report["per_class"].values())
    assert report["correct"] == sum(r["correct"] for r in records) > 0
    assert report["settings"]["prompt"].startswith("이 음식") and report["settings"]["quantization"] == "nf4"
    assert (report["index_hash"], report["world_size"], report["refused"]) == (shards.index_hash, 1, [])
    assert f"test: {report['correct']} of {len(shards)} pictures right" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == min(24, len(shards))
    assert "http" not in page and "<script" not in page
    assert not list((tmp_path / "out").glob(".*"))

    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    (accuracy,) = events.Scalars("test/accuracy")
    assert (accuracy.step, accuracy.value) == (7, pytest.approx(report["accuracy"]))
    (image,) = events.Images("test/predictions")
    assert image.width == 4 * 200 and image.height >= 4 * 200  # 16 pictures, four per row
    (text,) = events.Tensors("test/predictions/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    shown = [records[i] for i in panel.spread(16, len(records))]
    assert all(f"| {r['label']} | {r['prediction']} |" in table for r in shown)


def test_the_same_evaluation_is_not_run_twice(words, tmp_path, capsys):
    assert main([*words, "--limit", "5"]) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert main([*words, "--limit", "5", "--tensorboard", str(tmp_path / "tb")]) == 0
    assert capsys.readouterr().out.startswith("reused ")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert len(list((tmp_path / "tb").iterdir())) == 1  # the first run did not log this, so it is logged now
    assert main([*words, "--limit", "5", "--tensorboard", str(tmp_path / "tb")]) == 0
    assert len(list((tmp_path / "tb").iterdir())) == 1


def test_a_changed_evaluation_does_not_reuse_a_report(words, tiny_adapter, tiny_model, tmp_path, monkeypatch):
    assert main([*words, "--limit", "2"]) == 0

    def answered(*changed: str) -> bool:
        return find_earlier(check(parse([*words, "--limit", "2", *changed]))) is not None

    assert answered()
    assert not answered("--limit", "3")
    assert not answered("--split", "val")
    assert not answered("--max-new-tokens", "5")
    assert not answered("--batch-size", "3")
    assert not answered(*EXACT)
    for name, folder in (("adapter", tiny_adapter), ("model", tiny_model)):
        copy = shutil.copytree(folder, tmp_path / name)
        weights = next(copy.glob("*.safetensors"))
        assert not answered(f"--{name}", str(copy))
        data = bytearray(weights.read_bytes())
        data[8 + int.from_bytes(data[:8], "little")] ^= 1  # the first byte of the first tensor
        weights.write_bytes(data)
        assert (
            check(parse([*words, f"--{name}", str(copy)])).inputs[f"{name}_fingerprint"]
            != (check(parse(words)).inputs[f"{name}_fingerprint"])
        )
    (tmp_path / "out" / "predictions.jsonl").write_text("")
    assert not answered()


def test_confidence_is_the_probability_of_the_answer(words):
    """The confidence must equal exp(-training loss) of the same text, its answer and end token."""
    task, answerer, collator = load([*words, *EXACT])
    answers = answerer.answer(collator[micro_batch(*range(6))])
    checked = 0
    for i, answer in enumerate(answers):
        assert answer.confidence == pytest.approx(likelihood(task, answerer, i, answer.text), rel=1e-3)
        checked += answer.confidence > 0.01
    assert checked >= 3


def likelihood(task: Evaluation, answerer: Answerer, i: int, text: str) -> float:
    """Return p(text and its end token) from the training loss, for picture i."""

    pictures = answerer.template.pictures
    shown = pictures.encode(decode_rgb(task.shards.read(i).pictures[0]))
    encoded = answerer.template.encode(task.task.messages({}, 1), [shown.ids], text)
    is_image = encoded.is_image.astype(np.int64)[None]
    facts, shapes = pictures.arrange(shown.facts, is_image, [len(encoded)])
    arrays = targets_of(encoded.labels[None])
    batch = Batch(
        input_ids=torch.from_numpy(encoded.ids)[None],
        attention_mask=torch.ones(1, len(encoded), dtype=torch.long),
        is_image=torch.from_numpy(is_image),
        labels=torch.from_numpy(encoded.labels)[None],
        pixels=torch.from_numpy(shown.pixels),
        facts={name: torch.from_numpy(fact) for name, fact in facts.items()},
        shapes={name: torch.as_tensor(shape) for name, shape in shapes.items()},
        **{name: torch.from_numpy(array) for name, array in arrays.items()},
    )
    with torch.no_grad():
        loss, _, _ = AnswerLoss(answerer.model, pictures)(batch)
    return float(torch.exp(-loss))


def test_greedy_answers_end_at_the_end_token_of_training(words):
    _, answerer, collator = load([*words, *EXACT])
    answers = answerer.answer(collator[micro_batch(*range(len(collator.shards)))])
    names = {dish.name for dish in collator.shards.classes}
    assert {answer.text for answer in answers} & names
    assert all("<|" not in answer.text for answer in answers)


def test_sampling_and_penalties_of_a_base_model_do_not_change_the_greedy_answers(words, tiny_model, tmp_path):
    plain = main([*words, *EXACT, "--limit", "4"])
    model = shutil.copytree(tiny_model, tmp_path / "spiced")
    spice = json.loads((model / "generation_config.json").read_text())
    spice |= {"do_sample": True, "temperature": 1.5, "repetition_penalty": 3.0, "no_repeat_ngram_size": 1}
    (model / "generation_config.json").write_text(json.dumps(spice))
    out = tmp_path / "out2"
    spiced = main([*words, *EXACT, "--limit", "4", "--model", str(model), "--out", str(out)])
    assert plain == spiced == 0
    assert (out / "predictions.jsonl").read_bytes() == (tmp_path / "out" / "predictions.jsonl").read_bytes()


def test_batches_are_the_same_for_any_number_of_ranks():
    for num_samples in range(1, 40):
        for batch_size in (1, 3, 8):
            alone = ask.my_batches(num_samples, batch_size, World())
            assert [i for ids in alone for i in ids] == list(range(num_samples))
            for size in (2, 3, 5):
                ranks = [ask.my_batches(num_samples, batch_size, World(r, size, r)) for r in range(size)]
                assert sorted(ids for mine in ranks for ids in mine if ids) == alone
                assert len({len(mine) for mine in ranks}) == 1


# Settings


def settings_of(*words: str) -> Settings:
    return resolve_settings(build_parser("predict").parse_args(["predict", "x.jpg", "--model", "m", *words]))[0]


def facts_of(adapter: Path, copy: Path, **changes: object) -> str:
    shutil.copytree(adapter, copy)
    facts = json.loads((copy / "kfood.json").read_text(encoding="utf-8")) | changes
    (copy / "kfood.json").write_text(json.dumps(facts), encoding="utf-8")
    return str(copy)


def test_settings_come_from_the_adapter_then_the_recipe_then_the_defaults(tiny_adapter, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {shards: s, prompt: 이름은, max_length: 99}\nmodel: {base: b}\nrun: {dir: r}\n", "utf-8")
    adapter = facts_of(tiny_adapter, tmp_path / "a", prompt="무엇?", image_size=56, resize="crop", precision="fp32")
    assert settings_of().prompt.startswith("이 음식")
    assert (settings_of("--config", str(recipe)).prompt, settings_of("--config", str(recipe)).max_length) == (
        "이름은",
        99,
    )
    found = settings_of("--config", str(recipe), "--adapter", adapter)
    assert (found.prompt, found.image_size, found.resize, found.precision) == ("무엇?", 56, "crop", "fp32")
    assert settings_of("--adapter", adapter, "--set", "model.precision=bf16").precision == "bf16"
    assert settings_of("--set", "data.image_size=112").image_size == 112


def test_a_precision_that_the_adapters_attention_does_not_support_is_refused(tiny_adapter, tmp_path):
    adapter = facts_of(tiny_adapter, tmp_path / "a", attention="flash_attention_2", precision="bf16")
    words = ["--adapter", adapter, "--set", "model.precision=fp16"]
    with pytest.raises(RecipeError, match=r"the settings of adapter .*flash_attention_2 does not support float32"):
        settings_of(*words)
    assert settings_of(*words, "--set", "model.attention=sdpa").attention == "sdpa"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--set", "data.prompt=다른 물음"], "contradicts adapter"),
        (["--set", "model.precison=fp32"], "did you mean precision?"),
        (["--set", "nonsense"], "write it as section.key=value"),
        (["--shards", "nowhere"], "shard folder nowhere does not exist"),
        (["--split", "night"], "choose one of: train, val, test"),
        (["--model", "./nowhere"], "base model folder nowhere does not exist"),
        (["--adapter", "nowhere"], "nowhere holds no adapter"),
        (["--out", "{file}"], "--out {file}: {file} is not a folder"),
    ],
)
def test_mistakes_are_reported_before_torch_computes(words, tmp_path, capsys, extra, message):
    (tmp_path / "file").write_text("")
    file = str(tmp_path / "file")
    assert main([*words, *(word.replace("{file}", file) for word in extra)]) == 2
    assert message.replace("{file}", file) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 56}, "are 224 pixels wide, not 56"),
        ({"resize": "crop"}, "were resized by 'squash', but the adapter's by 'crop'"),
        ({"resize": "melt"}, "resize 'melt' is unknown"),
        ({"max_length": 60}, "data.max_length 60 is too short for a picture of 224 pixels"),
        ({"max_length": "long"}, "kfood.json: max_length"),
    ],
)
def test_pictures_that_do_not_match_the_adapter_are_refused(words, tiny_adapter, tmp_path, capsys, changes, message):
    assert main([*words, "--adapter", facts_of(tiny_adapter, tmp_path / "a", **changes)]) == 2
    assert message in capsys.readouterr().err


def test_an_adapter_of_another_task_is_named_as_the_remedy(words, tiny_adapter, tmp_path, capsys):
    """The remedy is not data.task, because the adapter fixes the task."""
    adapter = facts_of(tiny_adapter, tmp_path / "a", task="question", prompt="{question}")
    assert main([*words, "--adapter", adapter]) == 2
    message = capsys.readouterr().err
    assert "was trained on the task question, which needs the column question" in message
    assert message.endswith("→ name an adapter of the task dish or use other shards\n")
    with pytest.raises(RecipeError, match=r"^data.task question needs .* → set data.task=dish or use other shards$"):
        require_columns("question", ("category", "label"), "shards")


def test_a_damaged_kfood_json_is_refused(words, tiny_adapter, tmp_path, capsys):
    copy = shutil.copytree(tiny_adapter, tmp_path / "a")
    for content, message in (("{", "cannot be read"), ("[]", "is not a JSON object")):
        (copy / "kfood.json").write_text(content)
        assert main([*words, "--adapter", str(copy)]) == 2
        assert f"kfood.json {message}" in capsys.readouterr().err


def test_an_adapter_of_another_base_model_is_refused(words, tiny_adapter, tmp_path, capsys):
    from safetensors.numpy import load_file, save_file

    copy = shutil.copytree(tiny_adapter, tmp_path / "a")
    tensors = load_file(tiny_adapter / "adapter_model.safetensors")
    name = next(n for n in tensors if "layers.3" in n and n.endswith("q_proj.lora_A.weight"))
    for changed, message in (
        ({name: np.zeros((16, 2048), np.float32)}, "has 256 features, not (16, 2048)"),
        ({name: np.zeros(16, np.float32)}, "has 256 features, not (16,)"),
        ({name.replace("layers.3", "layers.35"): tensors[name]}, "layers.35.self_attn.q_proj is not in it"),
    ):
        save_file(tensors | changed, copy / "adapter_model.safetensors")
        assert main([*words, "--adapter", str(copy)]) == 2
        assert message in capsys.readouterr().err
    for tensors_found, message in (
        ({n: t for n, t in tensors.items() if n != name}, f"it lacks {name}"),
        (tensors | {"base_model.model.v_head.weight": tensors[name]}, "does not have base_model.model.v_head.weight"),
        (tensors | {name: tensors[name][:8]}, f"{name} is (8, 256), not (16, 256)"),
    ):
        save_file(tensors_found, copy / "adapter_model.safetensors")
        assert main([*words, "--adapter", str(copy)]) == 2
        assert message in capsys.readouterr().err
    (copy / "adapter_model.safetensors").write_bytes(b"cut")
    assert main([*words, "--adapter", str(copy)]) == 2
    assert f"adapter {copy} is damaged" in capsys.readouterr().err


def test_loader_processes_change_no_answer(words: list[str], tmp_path: Path) -> None:
    found = []
    for workers in ("0", "2"):
        assert main([*words[:-1], str(tmp_path / workers), "--workers", workers]) == 0
        found.append((tmp_path / workers / "predictions.jsonl").read_bytes())
    assert found[0] == found[1] != b""
    with pytest.raises(SystemExit):
        main([*words, "--workers", "-1"])


def test_only_the_picture_that_is_too_long_is_refused(words, pictures):
    """One packed picture is larger than the rest, so only this one cannot fit."""
    task, answerer, collator = load(words)
    large = prepare_jpeg(next(pictures.rglob("Img_*")).read_bytes(), 448)

    class OneLarge(ShardSplit):
        def read_many(self, ids):
            found = zip(ids, super().read_many(ids), strict=True)
            return [sample._replace(pictures=(large,)) if i == 1 else sample for i, sample in found]

    collator.shards = OneLarge(task.shards.manifest, "test")
    answerer.template.max_length = 120  # enough for 64 image tokens and some text, not for 256 image tokens
    assert list(ask.answer_batch(collator, answerer, collator[micro_batch(0, 1, 2)])) == [0, 2]
    assert ask.answer_batch(collator, answerer, collator[micro_batch(1)]) == {}


def record_of(task: Evaluation, i: int, text: str) -> Prediction:
    return ask.make_record(task.shards.key(i), task.shards.read(i).columns, task.task, text, 0.9)


def test_refused_pictures_count_as_wrong_and_are_named(words, tmp_path):
    task = check(parse([*words, "--limit", "3"]))
    right = {i: record_of(task, i, task.shards.read(i).columns["label"]) for i in (0, 2)}
    parts = [ask.Part({0: right[0]}, [1], 1.0), ask.Part({2: right[2]}, [], 1.0)]
    write_results(task, parts, World(), torch.device("cpu"))
    report, records = read(tmp_path / "out")
    assert (report["correct"], report["images"], report["refused"]) == (2, 3, ["test-00000001"])
    assert [(r["raw"], r["correct"]) for r in records][1] == ("", False)
    with pytest.raises(AssertionError, match="a picture has no record"):
        write_results(task, parts[:1], World(), torch.device("cpu"))


def test_the_report_is_written_before_tensorboard(words, tmp_path, monkeypatch):
    task = check(parse([*words, "--limit", "1", "--tensorboard", str(tmp_path / "tb")]))
    parts = [ask.Part({0: record_of(task, 0, "x")}, [], 1.0)]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(panel, "log", full)
    with pytest.raises(OSError, match="No space left"):
        write_results(task, parts, World(), torch.device("cpu"))
    assert read(tmp_path / "out")[0]["images"] == 1


# Panel


def test_the_font_of_fontconfig_is_used_if_it_has_hangul(tmp_path, monkeypatch):
    answer = tmp_path / "fc-match"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert panel.hangul_font() is None  # fontconfig is not installed
    answer.write_text("#!/bin/sh\nprintf %s /nowhere.ttf\n")
    answer.chmod(0o755)
    assert panel.hangul_font() is None
    monkeypatch.setattr(panel, "has_hangul", lambda path: True)
    assert panel.hangul_font() == "/nowhere.ttf"


def test_a_font_search_that_takes_too_long_is_stopped(monkeypatch):
    """fc-match may first have to build its cache."""

    def hang(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(panel.subprocess, "run", hang)
    assert panel.hangul_font() is None


def test_the_panel_draws_names_if_a_font_has_hangul(tmp_path):
    record = Prediction("k", "s", "김밥", "파|전<b>", "x", False, 0.5)
    assert "| 1 | 김밥 | 파·전·b· | ✗ |" in panel.caption_table([record])
    jpeg = prepare_jpeg(_png(), 56)
    drawn = panel.draw([(record, jpeg)] * 5, None)
    assert drawn.shape == (2 * (200 + 44), 4 * 200, 3) and drawn.dtype == np.uint8
    assert not panel.has_hangul("/nowhere.ttf")
    font = panel.hangul_font()
    if font:
        assert (panel.draw([(record, jpeg)], font) != panel.draw([(record, jpeg)], None)).any()


def test_a_font_without_hangul_is_recognised(tmp_path):
    fonts = sorted(Path("/usr/share/fonts").rglob("DejaVuSans.ttf"))
    if not fonts:
        pytest.skip("DejaVu Sans, a font without Hangul, is not installed")
    assert not panel.has_hangul(str(fonts[0]))
    record = Prediction("k", "s", "Gimbap", "Pajeon", "x", True, 0.5)  # the font has these letters
    drawn = [panel.draw([(record, prepare_jpeg(_png(), 56))], font) for font in (None, str(fonts[0]))]
    assert (drawn[0] != drawn[1]).any()


def _png() -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_logging_a_step_again_replaces_it(tmp_path):
    samples = [(Prediction("k", "s", "김밥", "김밥", "김밥", True, 0.5), prepare_jpeg(_png(), 56))]
    assert not panel.is_logged(tmp_path, "test", 7)
    for accuracy, step in ((0.25, 7), (0.5, 7), (0.75, 17)):
        panel.log(tmp_path, "test", step, accuracy, samples)
    assert panel.is_logged(tmp_path, "test", 7) and not panel.is_logged(tmp_path, "val", 7)
    assert len(list(tmp_path.iterdir())) == 2
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("test/accuracy")] == [(7, 0.5), (17, 0.75)]


def test_pictures_are_chosen_evenly():
    assert panel.spread(4, 8) == [0, 2, 4, 6]
    assert panel.spread(16, 3) == [0, 1, 2]


def test_reusing_a_report_imports_no_torch(words, tmp_path):
    import subprocess

    base = [w for w in words if w not in ("--adapter", words[words.index("--adapter") + 1])]
    assert main([*base, "--limit", "1"]) == 0
    code = (
        "import sys; from kfood_dist.cli import main; status = main(sys.argv[1:]);"
        "sys.exit(status or ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, *base, "--limit", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("reused ")
