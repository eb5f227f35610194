"""Training: where it runs, how long and how fast."""

from tfgptopt.training.batches import find_batch_size
from tfgptopt.training.devices import describe, is_chief, strategy
from tfgptopt.training.finding import find_learning_rate
from tfgptopt.training.rates import (
    InverseSquareRoot,
    StableDecay,
    Warmup,
    learning_rate_schedule,
    set_rates,
)
from tfgptopt.training.replicas import prepare
from tfgptopt.training.sharding import shard

__all__ = [
    "InverseSquareRoot",
    "StableDecay",
    "Warmup",
    "describe",
    "find_batch_size",
    "find_learning_rate",
    "is_chief",
    "learning_rate_schedule",
    "prepare",
    "set_rates",
    "shard",
    "strategy",
]
