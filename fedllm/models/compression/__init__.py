"""Smaller models out of a base: weights that stay zero, layers, neurons and heads that go."""
