"""The parts of the training benchmark, `tests/bench/train.py`."""
