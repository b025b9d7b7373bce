"""Fusing by what layers compute: `fit` has the mathematics, `bottom_up` runs it from the lowest group up."""
