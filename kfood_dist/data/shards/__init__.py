"""The packed format: manifest, tars with their indexes, and what reads and checks them."""
