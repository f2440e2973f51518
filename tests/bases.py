"""Base models in the forms that users have: as published, split into shards, in the hub's cache, of other families."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kfood_dist.practice.tiny_model import build_config, preprocessor_settings, train_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file. The value None removes a key."""
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


def cut(folder: Path) -> list[Path]:
    """Split a folder's weights into two shards with an index, as larger models are published. Returns the shards."""
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names, shards, index = sorted(tensors), [], {}
    for part, chosen in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        shards.append(folder / f"model-{part:05d}-of-00002.safetensors")
        save_file({name: tensors[name] for name in chosen}, shards[-1], {"format": "pt"})
        index |= dict.fromkeys(chosen, shards[-1].name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return shards


def publish(folder: Path) -> None:
    """Change a saved model to the layout of the hub: old parameter names, flat config, rope_scaling of type mrope."""
    weights = folder / "model.safetensors"
    old = {name.removeprefix("model.") if ".visual." in name else name.replace("language_model.", ""): tensor
           for name, tensor in load_file(weights).items()}  # fmt: skip
    save_file(old, weights, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat = {**text, **config, "torch_dtype": config.pop("dtype")}
    (folder / "config.json").write_text(json.dumps(flat))
    cut(folder)


def put_into_cache(folder: Path, cache: Path, name: str) -> Path:
    """Put a model's files into a hub cache under `name`, in the layout of the hub's client. Returns the snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for part in (snapshot, repository / "blobs", repository / "refs"):
        part.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for i, path in enumerate(sorted(folder.iterdir())):
        blob = repository / "blobs" / f"{i:040x}"
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def write_qwen2_vl(folder: Path) -> None:
    """Write a tiny random Qwen2-VL of the real class, with the tokenizer and picture settings of the practice model."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    tokenizer = train_tokenizer()
    other = build_config(tokenizer).to_dict()
    text = {k: v for k, v in other["text_config"].items() if k not in ("model_type", "layer_types")}
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = Qwen2VLConfig(
        text_config=text,
        vision_config={"depth": 2, "embed_dim": 128, "hidden_size": 256, "mlp_ratio": 2, "num_heads": 4},
        tie_word_embeddings=True,
        dtype="bfloat16",
        **{name: other[name] for name in ids},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2VLForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = preprocessor_settings() | {"processor_class": "Qwen2VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


LLAVA_TEMPLATE = """\
{%- for message in messages -%}
{{ message.role.upper() + ': ' if message.role != 'system' }}
{%- for part in message.content -%}
{{ '<image>\\n' if part.type == 'image' else part.text }}
{%- endfor -%}
{{ ' ' if message.role != 'assistant' else '</s>' }}
{%- endfor -%}
{{ 'ASSISTANT:' if add_generation_prompt }}"""


def write_llava(folder: Path, seed: int = 0) -> None:
    """Write a tiny, untrained LLaVA-1.5 of the real classes. Its own processor turns a picture into 16 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["USER: ASSISTANT: 이 음식의 이름은 무엇인가요?"], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # as Llama's
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        initializer_range=0.06,
    )
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
        projection_dim=64,
        initializer_range=0.06,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        dtype="bfloat16",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
