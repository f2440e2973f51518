"""From the bytes of a picture file to what a model is shown."""
