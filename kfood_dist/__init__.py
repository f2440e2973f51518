"""kfood_dist: from a folder of dish photos to a tuned Qwen2.5-VL that names the dish."""

__version__ = "0.1.0"
