"""What a task makes of its data."""
