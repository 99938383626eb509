"""T5X's `t5x.examples.decoder_only`."""
