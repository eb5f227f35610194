"""One of two workers: `python worker.py index port folder [run step signal]`.

The tests start both. With a run, trains for long, and sends itself a signal behind a step.
"""

import faulthandler
import json
import os
import sys
from pathlib import Path

index, port, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TF_CONFIG"] = json.dumps(
    {
        "cluster": {"worker": [f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}"]},
        "task": {"type": "worker", "index": index},
    }
)
faulthandler.dump_traceback_later(240, exit=True)  # Whoever waits for a worker that is gone.

from tfgptopt.training import describe, is_chief, prepare, shard, strategy  # noqa: E402

chosen = strategy("auto")
print(describe(chosen), flush=True)

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np  # noqa: E402
import techniques  # noqa: E402
from training import long_run  # noqa: E402

if len(sys.argv) > 4:
    name, step, number = sys.argv[4], int(sys.argv[5]), int(sys.argv[6])
    long_run.run(chosen, folder / "shared" / name, folder / f"{name}{index}.npz", step, number)
    sys.exit()

(folder / f"{index}").mkdir()
student, losses = techniques.train("recorded", chosen, folder / f"{index}")
arrays = [each[0] for each in techniques.state(student)]
rows = shard(techniques.batches().unbatch(), techniques.BATCH, chosen)
seen = np.concatenate([inputs["token_ids"] for inputs, *_ in rows.as_numpy_iterator()])
np.savez(folder / f"worker{index}.npz", *arrays, losses=losses, seen=seen, chief=is_chief(chosen))

with chosen.scope():
    assert is_chief() == is_chief(chosen)
    student.compile(optimizer="sgd", weighted_metrics=[])
    prepare(student)
for data in (techniques.batches().take(5 - index), techniques.batches().unbatch().batch(1)):
    try:
        student.fit(data, verbose=0)
    except ValueError as error:
        print("refused:", error, flush=True)

long_run.run(chosen, folder / "shared" / "whole", folder / f"whole{index}.npz")
