"""How the runs of a study use several cores: fresh processes of one thread each."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

import torch
from tqdm import tqdm

RunT = TypeVar("RunT", bound=Hashable)
ResultT = TypeVar("ResultT")


def train_all(
    train: Callable[[RunT], ResultT], runs: Sequence[RunT], pool: Executor, bar: tqdm
) -> dict[RunT, ResultT]:
    """What `train` returns for each run; the bar moves on as they end, in any order."""
    done = {}
    futures = {pool.submit(train, run): run for run in runs}
    for future in as_completed(futures):
        done[futures[future]] = future.result()
        bar.update()
    return done


@contextmanager
def workers(count: int) -> Iterator[Executor]:
    """A pool of `count` fresh processes that Ctrl-C, or any error, ends at once."""
    # spawn: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker)
    others = set(multiprocessing.active_children())
    try:
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    torch.set_num_threads(1)
