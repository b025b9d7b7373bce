"""What a run is made of, checked and planned before any long work."""
