"""Below all: the machine, its processes, files, locks and ranks. Nothing here needs torch to be imported."""
