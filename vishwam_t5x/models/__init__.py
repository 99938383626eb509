"""Floor 2: the encoder-decoder and the layers it is made of (Flax Linen)."""
