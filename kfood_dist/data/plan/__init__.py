"""Who reads which sample at which step."""
