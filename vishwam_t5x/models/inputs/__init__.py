"""One module per input modality, all behind one interface."""
