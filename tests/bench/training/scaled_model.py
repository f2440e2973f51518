"""A Qwen2.5-VL of 61 M parameters with the proportions of the 3B model, for a benchmark on a few CPU cores.

    sizes of the 3B model ──► a quarter of each width and depth ──► random weights, practice tokenizer ──► folder

| kept exactly                                       | 3B            | here      |
|----------------------------------------------------|---------------|-----------|
| width of tower / width of language model           | 1280 / 2048   | 320 / 512 |
| width of MLP / width, language model               | 11008 / 2048  | 2752 / 512|
| query heads : key and value heads                  | 16 : 2        | 8 : 1     |
| width of head, language model : tower              | 128 : 80      | 64 : 40   |
| blocks of tower : layers of language model         | 32 : 36       | 8 : 9     |
| blocks with full attention                         | each 8th      | each 8th  |
| patches, window, merging: 64 image tokens at 224 px| the same      | the same  |

The vocabulary has as many rows as give the head its share of the language model's FLOPs. The tokenizer uses only the
first of them. The tower's MLP is 856 wide, a multiple of 8. `flop_shares` counts the shares of both models, and the
report shows them. The classes are the real ones, so a layer runs the same operations, in a quarter as many layers.

The chat template ends the last answer without a newline. So the trainers that label all that the template writes after
the prompt have the same label tokens as ours: the answer and the end token.
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
REAL_CONFIG = ROOT / "tests/unit/qwen2_5_vl_3b.json"
VOCABULARY_SIZE = 9536
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 512,
    "intermediate_size": 2752,
    "num_hidden_layers": 9,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "initializer_range": 0.04,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [8, 12, 12]},
}
VISION: dict[str, Any] = {
    "depth": 8,
    "hidden_size": 320,
    "intermediate_size": 856,
    "num_heads": 8,
    "out_hidden_size": 512,
    "fullatt_block_indexes": [7],
    "initializer_range": 0.04,
}


def write_scaled_model(folder: Path, seed: int = 0) -> None:
    """Write the model with its tokenizer and its processor settings into `folder`, which is made if missing."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from kfood_dist.practice import tiny_model

    tokenizer = tiny_model.train_tokenizer()
    tokenizer.chat_template = end_without_newline(tokenizer.chat_template)
    tree = tiny_model.build_config(tokenizer).to_dict()
    for section, sizes in (("text_config", TEXT), ("vision_config", VISION)):
        tree[section] |= sizes
    tree["text_config"].pop("layer_types", None)  # it has one entry per layer; the config makes it again
    config = Qwen2_5_VLConfig(**tree)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    tiny_model.make_vision_trainable(model.model.visual)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(tiny_model.preprocessor_settings()), encoding="utf-8")


def end_without_newline(template: str) -> str:
    """Return the practice set's chat template, changed so that a last turn of the assistant ends with its end token."""
    every_turn = "'<|im_end|>\\n' }}\n{%- endfor"
    assert every_turn in template, "the practice set has another chat template now"
    but_the_last = "'<|im_end|>' + ('' if loop.last and message.role == 'assistant' else '\\n') }}\n{%- endfor"
    return template.replace(every_turn, but_the_last)


def flop_shares(tokens: int) -> dict[str, dict[str, float]]:
    """Return the shares of tower, language model and head in a forward pass, of the 3B model and of the scaled one.

    A sample has one picture of 224 px and `tokens` tokens. The head runs at every token, as in most trainers.
    """
    real = json.loads(REAL_CONFIG.read_text(encoding="utf-8"))
    scaled = real | {part: real[part] | sizes for part, sizes in (("text_config", TEXT), ("vision_config", VISION))}
    scaled["text_config"].pop("layer_types", None)
    return {"3B": _shares(real, tokens), "scaled": _shares(scaled, tokens)}


def _shares(tree: dict[str, Any], tokens: int) -> dict[str, float]:
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from kfood_dist.estimate.counts import Counts
    from kfood_dist.estimate.flops import read_coefficients

    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**tree))
    sample = Counts(
        num_tokens=tokens,
        num_causal_pairs=tokens * (tokens + 1) // 2,
        num_patches=256,
        num_tower_tokens=256,
        num_window_pairs=4 * 64**2,
        num_full_pairs=256**2,
        num_image_tokens=64,
        num_labels=tokens,
    )
    forward = {part: cost.forward for part, cost in read_coefficients(model).by_part(sample).items()}
    forward["tower"] += forward.pop("connector")
    return {part: flops / sum(forward.values()) for part, flops in forward.items()}
