"""One optimiser step on DeepSpeed ZeRO, DDP or a single process."""
