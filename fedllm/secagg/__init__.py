"""Secure aggregation: the server learns a sum of the clients' updates, and none of them by itself."""
