"""Averaging of clients that take unlike numbers of local steps: FedNova."""
