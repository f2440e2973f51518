"""Where the parts of a Qwen2.5-VL lie in transformers 5, as module paths from the model's root."""

LANGUAGE_MODEL = "model.language_model"
VISION_TOWER = "model.visual"
HEAD = "lm_head"
