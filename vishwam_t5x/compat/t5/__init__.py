"""T5X's `t5x.examples.t5`."""
