"""What a sample asks, and what counts as a right answer."""
