"""Training: where it runs."""

from tfgptopt.training.devices import describe, strategy

__all__ = ["describe", "strategy"]
