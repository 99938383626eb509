"""One module per output modality, all behind one interface."""
