"""Where packed data sets lie: folders and URLs."""
