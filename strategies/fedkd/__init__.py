"""FedKD: private teachers, a shared student."""
