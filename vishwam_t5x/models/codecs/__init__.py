"""Codecs: pictures and sound to discrete codes and back, and the vocoder."""
