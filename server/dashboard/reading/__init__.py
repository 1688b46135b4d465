"""The runs as the dashboard reads them."""
