"""What this machine has, what is missing, and what mends it."""
