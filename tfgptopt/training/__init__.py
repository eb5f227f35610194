"""Training: where it runs, how long and how fast."""

from tfgptopt.training.devices import describe, strategy

__all__ = ["describe", "strategy"]
