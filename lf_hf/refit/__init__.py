"""Fusing by what layers compute. `fit` has the mathematics, `groups` chooses layers, `last_pass` makes them again."""
