"""Fusing by what layers compute: boundaries, pair_costs, group (with its regression), and the last pass bottom_up."""
