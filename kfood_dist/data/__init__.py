"""From packed shards to batches. This package imports neither the packer nor the model."""
