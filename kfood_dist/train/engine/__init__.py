"""One optimiser step with DeepSpeed ZeRO, DDP or a single process."""
