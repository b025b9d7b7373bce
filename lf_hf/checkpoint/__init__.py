"""Checkpoints on disk: the base, its weights, saving, and folders that several runs share."""
