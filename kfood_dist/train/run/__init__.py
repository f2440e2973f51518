"""What a run leaves and watches: checkpoints, log, stop requests, stalls."""
