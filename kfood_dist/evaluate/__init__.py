"""How many answers of a model are right."""
