"""Which adjacent layers become one: decided on the dense model, before anything changes."""
