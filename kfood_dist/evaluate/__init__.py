"""The evaluation of a model: how many of its answers are right."""
