"""Tasks: what the model is asked about a sample, and which answers are right."""
