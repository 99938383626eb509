"""Floor 2: cached records, mixtures, packing and prefetching, free of TensorFlow."""
