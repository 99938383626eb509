"""Floor 3: metrics over predictions of a checkpoint."""
