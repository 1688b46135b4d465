"""What people do through pages and API."""
