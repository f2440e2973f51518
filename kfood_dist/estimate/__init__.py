"""The work of a training step, counted, and the rate at which a device can do it."""
