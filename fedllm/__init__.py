"""Federated fine-tuning of language models: the library under the strategies, the apps and the simulations."""
