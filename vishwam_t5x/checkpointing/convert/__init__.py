"""Checkpoints of other programs: T5X's and Hugging Face's, read and written array by array."""
