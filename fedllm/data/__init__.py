"""Texts: read, checked, split, shared out and tokenised."""
