"""Floor 1: number formats by name and loss scaling."""
