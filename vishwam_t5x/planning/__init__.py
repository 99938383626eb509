"""What a run would need and how long a step would take, on hardware that is not there."""
