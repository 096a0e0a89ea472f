"""Federated learning with tunable soft prompts as messengers (FedSP)."""

__version__ = "0.1.0"
