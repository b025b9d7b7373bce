"""Fusing by what layers compute: boundaries, group_costs, group (with its regression), and the last pass bottom_up."""
