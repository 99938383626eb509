"""T5X's names for what we have: its gin files run here as they are."""
