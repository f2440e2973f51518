"""The storage of packed data sets: folders and URLs."""
