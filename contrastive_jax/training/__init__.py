"""State, step, optimisers, checkpoints and the loop that joins them."""
