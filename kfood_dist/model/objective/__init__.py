"""The losses that a run can minimise."""
