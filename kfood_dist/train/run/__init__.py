"""The files and checks of a run: checkpoints, log, stop requests, stalls."""
