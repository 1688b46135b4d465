"""Rows that need no network: each source a pure function of an installed package and a fixed seed."""
