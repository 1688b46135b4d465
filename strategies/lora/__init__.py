"""Federated LoRA with exact aggregation of products."""
