"""Differential privacy: secret noise, and what it costs and buys."""
