"""T5X's `t5x.examples.scalable_t5`."""
