"""A deployed federation: its keys, its SuperLink, its runs."""

__all__ = ["FEDERATION"]

FEDERATION = "FEDLLM_FEDERATION"
"""Environment variable by which a SuperLink tells its ServerApps the federation's folder."""
