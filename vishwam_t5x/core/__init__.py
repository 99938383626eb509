"""Floor 0: batches, sequences, errors, random numbers, hardware facts; imports no other room."""
