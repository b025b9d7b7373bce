"""Families of models: how their layers differ, as data, and where in a model its decoder is."""
