"""Where a simulated federation runs."""
