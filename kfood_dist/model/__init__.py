"""The base model, its adapters, and what is trained of it."""
