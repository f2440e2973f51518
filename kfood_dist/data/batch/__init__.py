"""From sample ids to batches of tensors, in loader processes."""
