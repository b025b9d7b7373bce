"""Fused models in lm-eval: the backend, and sweeps over levels and methods."""
