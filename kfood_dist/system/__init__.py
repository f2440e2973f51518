"""The lowest layer: the machine, its processes, files, locks and ranks. No module here imports torch when loaded."""
