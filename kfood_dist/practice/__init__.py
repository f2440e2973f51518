"""The output of `kfood mini`: a practice set of drawn dishes, and a tiny untrained Qwen2.5-VL to train on it."""
