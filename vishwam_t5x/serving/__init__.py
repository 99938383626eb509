"""Decoding text, exporting and serving a trained model."""
