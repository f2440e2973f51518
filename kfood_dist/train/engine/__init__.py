"""One optimiser step with DeepSpeed ZeRO, with plain data parallelism, or in a single process."""
