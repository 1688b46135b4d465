"""Local training without client drift: SCAFFOLD."""
