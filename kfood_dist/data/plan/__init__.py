"""Which rank reads which sample at which step."""
