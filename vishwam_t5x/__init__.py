"""A JAX trainer for multimodal encoder-decoders."""

__version__ = "0.1.0"
