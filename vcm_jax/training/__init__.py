"""Training: setup, the loop, one step, the state, watching and validating."""
