"""The base model as its makers meant it: described, loaded whole, quantised, or refused."""
