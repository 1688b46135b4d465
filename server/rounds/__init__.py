"""Rounds: the engine and everything that it is composed of."""
