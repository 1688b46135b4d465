"""Federated fine-tuning of language models: the library under strategies, apps and simulations."""
