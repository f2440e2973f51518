"""From a recipe to a tuned adapter."""
