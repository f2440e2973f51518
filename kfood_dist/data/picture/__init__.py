"""From the bytes of a picture file to the input of a model."""
