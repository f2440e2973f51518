"""What `kfood mini` makes: a practice set of drawn dishes and a tiny untrained Qwen2.5-VL to learn on it."""
