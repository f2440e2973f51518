"""A tiny, untrained Qwen2.5-VL: the Python classes and file layout of the 3B model, small enough for two CPU cores.

    sentences ──► byte-level BPE ──► Qwen's special tokens and chat template ──► tokenizer files
    sizes + seed ──► Qwen2_5_VLConfig ──► random weights ──► config, weights, generation settings
    fixed numbers ──► preprocessor_config.json

Always holds: AutoTokenizer, AutoImageProcessor and AutoModelForImageTextToText load the folder offline, with or without
torchvision. The tokenizer encodes any Korean text and decodes it unchanged. The same seed gives the same bytes.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfood_dist.practice.pictures import DISHES

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2Tokenizer

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
VOCABULARY_SIZE = 640
IMAGE_TOKEN_PIXELS = 28  # one image token stands for 2×2 patches of 14 pixels

# The layout of Qwen2.5's conversations, in our own template. Each turn is between <|im_start|>role and <|im_end|>. A
# default system turn is added if none is given. Each picture is one <|image_pad|>, which the processor (or the
# collator) repeats.
CHAT_TEMPLATE = """\
{%- macro show(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content -%}
{%- if part.type == 'text' -%}{{ part.text }}
{%- elif part.type == 'image' or 'image' in part or 'image_url' in part -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' or 'video' in part -%}<|vision_start|><|video_pad|><|vision_end|>
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + show(message.content) + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

_SENTENCES = (
    "system\nYou are a helpful assistant.",
    "user\n",
    "assistant\n",
    "이 음식의 이름은 무엇인가요?",
    "이 음식의 이름은 무엇입니까?",
    "사진 속 음식의 이름을 답하세요.",
    "사진에 있는 한국 음식의 이름을 한 단어로 말해 주세요.",
    "이 요리는 무엇인가요? 이름만 대답해 주세요.",
    "다음 사진을 보고 음식 이름만 짧게 적으세요.",
    "그릇에 담긴 국과 찌개, 접시에 놓인 전과 튀김을 구별하세요.",
    "밥, 면, 떡, 김치, 나물, 구이, 볶음, 조림, 찜, 탕, 회, 죽, 만두, 한과",
)


def train_tokenizer() -> "Qwen2Tokenizer":
    """Return Qwen's tokenizer (same normaliser, splitter and special tokens) with a vocabulary from a few sentences.

    The vocabulary starts with all 256 bytes, so other text needs more tokens but is never lost.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    frame = Qwen2Tokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer, bpe.decoder = frame.normalizer, frame.pre_tokenizer, frame.decoder
    special = (END_OF_TEXT, IM_START, IM_END, *VISION_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    names = [dish.name for dish in DISHES]
    bpe.train_from_iterator([*_SENTENCES, *names], trainer)
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special[1:])})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_config(tokenizer: "Qwen2Tokenizer") -> "Qwen2_5_VLConfig":
    """Return the sizes of the tiny model. Every quantised matrix has a width that is a multiple of 64, NF4's block."""
    from transformers import Qwen2_5_VLConfig

    ids = dict(zip(VISION_TOKENS, tokenizer.convert_tokens_to_ids(list(VISION_TOKENS)), strict=True))
    text: dict[str, Any] = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.06,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "out_hidden_size": 256,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.06,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def preprocessor_settings() -> dict[str, Any]:
    """Return the image processor settings of Qwen2.5-VL, in a form that every backend of transformers 5 reads."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": 4 * IMAGE_TOKEN_PIXELS**2,
        "max_pixels": 16384 * IMAGE_TOKEN_PIXELS**2,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def make_vision_trainable(tower: "torch.nn.Module") -> None:
    """Draw some weights of a random vision tower again, in place, so that its frozen features are useful for training.

    The patch filters become smooth, like those of a trained tower: each is drawn as 2×2 and scaled up, so it sees
    colours and broad edges instead of pixel noise. The biases become random instead of 0, because otherwise the norms
    make bright and dim patches of one colour look the same.
    """
    import torch

    filters = tower.get_parameter("patch_embed.proj.weight")
    out, colours, frames, side, _ = filters.shape
    coarse = torch.randn(out, colours, 2, 2) / (1.6 * side**2 * colours) ** 0.5
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    with torch.no_grad():
        filters.copy_(smooth[:, :, None].expand(-1, -1, frames, -1, -1) / frames)
        for name, weight in tower.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0.0, 0.7)


def write_model(folder: Path, seed: int) -> None:
    """Write the tiny model into `folder`, which is made if missing. The weights depend only on `seed`."""
    import torch
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = train_tokenizer()
    config = build_config(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
        make_vision_trainable(model.model.visual)
        model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=32,
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = json.dumps(preprocessor_settings(), indent=2, sort_keys=True)
    (folder / "preprocessor_config.json").write_text(settings + "\n", encoding="utf-8")
