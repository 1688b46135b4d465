"""Mixed cohorts: some clients train by backpropagation, the others probe by forward passes, in one round."""
