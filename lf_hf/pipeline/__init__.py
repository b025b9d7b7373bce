"""A run from end to end: what it is made of, its plan, and its steps. Start reading in `run`."""
