"""The only room besides tasks/ that may import TensorFlow and SeqIO."""
