"""Floor 1: denoisers, losses and metrics, in NumPy and JAX only."""
