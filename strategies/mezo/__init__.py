"""Zeroth-order local steps, averaged."""
