"""Prompts that are continued by several processes, which share the memory of packed weights."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from tfgptopt.generation.codec import Prompt
from tfgptopt.generation.speculating import Statistics

# Prompts are handed out in so many portions for each process, so that none waits for long.
_PORTIONS = 8


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    connection: Connection


def generate_in_processes(
    create: Callable[[], Any],
    num_workers: int,
    prompts: Sequence[Prompt],
    settings: dict[str, Any],
    together: int,
) -> tuple[list[Any], Statistics]:
    """Continues prompts in processes of their own.

    Args:
        create: Makes the model in each. It is sent there, and so are the settings: both must be
            such that `pickle` takes them.
        num_workers: How many processes.
        prompts: The prompts.
        settings: Of `generate`.
        together: How many prompts a model decodes at once.

    Returns:
        The results, in the order of the prompts, and the statistics of all.

    Raises:
        RuntimeError: If a process died.
    """
    size = max(together, len(prompts) // (num_workers * _PORTIONS), 1)
    portions = [(begin, prompts[begin : begin + size]) for begin in range(0, len(prompts), size)]
    portions.reverse()
    results: list[Any] = [None] * len(prompts)
    counts = Statistics()
    workers: list[_Worker] = []
    try:
        for _ in range(min(num_workers, len(portions))):
            workers.append(_start(create, settings))
            workers[-1].connection.send(portions.pop())
        busy = list(workers)
        while busy:
            ready = wait([worker.connection for worker in busy])
            for worker in [worker for worker in busy if worker.connection in ready]:
                begin, texts, statistics = _receive(worker)
                results[begin : begin + len(texts)] = texts
                counts.add(statistics)
                if portions:
                    worker.connection.send(portions.pop())
                else:
                    busy.remove(worker)
    finally:  # Also where somebody pressed Ctrl-C.
        for worker in workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in workers:
            worker.process.join()
    return results, counts


def _start(create: Callable[[], Any], settings: dict[str, Any]) -> _Worker:
    context = multiprocessing.get_context("spawn")  # Threads of kernels do not survive a fork.
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, create, settings), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _receive(worker: _Worker) -> tuple[int, list[Any], Statistics]:
    """Returns what a process made.

    Raises:
        RuntimeError: If it died.
    """
    try:
        found = worker.connection.recv()
    except (EOFError, ConnectionError):
        worker.process.join()
        raise RuntimeError(
            f"A worker process ended with exit code {worker.process.exitcode} before its texts "
            "were done: it was killed, ran out of memory (take fewer workers), or could not begin. "
            "A script that starts processes keeps what it runs behind "
            "`if __name__ == '__main__':`."
        ) from None
    if isinstance(found, BaseException):
        raise found
    return found  # type: ignore[no-any-return]


def _work(connection: Connection, create: Callable[[], Any], settings: dict[str, Any]) -> None:
    """Continues what comes, in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The one who asked ends all.
    try:
        model = create()
        while True:
            begin, prompts = connection.recv()
            texts, statistics = model.generate(list(prompts), **settings, return_stats=True)
            connection.send((begin, texts, statistics))
    except (EOFError, ConnectionError):
        return
    except Exception as error:
        connection.send(error)
