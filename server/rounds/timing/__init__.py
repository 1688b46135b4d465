"""Rounds in time: the clock of simulated devices, what answers cost on it, and commits that wait for some."""
