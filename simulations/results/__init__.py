"""What people take from finished runs: tables, plots, reports, predictions."""
