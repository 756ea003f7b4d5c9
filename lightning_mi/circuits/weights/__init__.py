"""What the weights alone say: copying, composition, subspaces."""
