"""The packed format: the manifest, the tars and their indexes, and the code that reads and checks them."""
