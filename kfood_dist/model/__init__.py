"""The base model, its adapters, and the parts of it that train."""
