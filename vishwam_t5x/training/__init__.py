"""Floor 4: the state, the step, the loop and its hooks."""
