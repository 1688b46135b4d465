"""Who may enter the dashboard."""
