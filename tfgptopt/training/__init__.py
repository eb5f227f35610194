"""Training: where it runs, how long and how fast."""

from tfgptopt.training.devices import describe, is_chief, strategy
from tfgptopt.training.replicas import prepare
from tfgptopt.training.sharding import shard

__all__ = ["describe", "is_chief", "prepare", "shard", "strategy"]
