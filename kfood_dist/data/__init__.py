"""From packed shards to batches; imports neither the packer nor the model."""
