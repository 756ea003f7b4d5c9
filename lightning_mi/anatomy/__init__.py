"""What a transformer is made of: heads, weights and the residual graph, found by asking it."""
