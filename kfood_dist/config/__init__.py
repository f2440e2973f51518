"""The recipe: its sections, and YAML as recipes use it."""
