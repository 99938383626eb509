"""Floor 2: saving and restoring the training state."""
