"""Runs on disk: written by one process, read by any."""
