"""Start ranks and supervise them."""
