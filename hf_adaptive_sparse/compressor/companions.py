"""Further workers of a search in processes of their own, on this machine."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnProcess

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from hf_adaptive_sparse.compressor.model_source import ModelSource
from hf_adaptive_sparse.profiles import check_count

logger = logging.getLogger(__name__)

Job = Callable[[ModelSource], object]
"""What a worker does with its model; it is pickled."""


def check_workers(workers: int) -> None:
    """Check, before any work is done, that so many processes can be started.

    Raises:
        ValueError: If ``workers`` is not at least 1, or if this process is a companion that imports
            the script of the first worker, and the script would start workers again.
    """
    check_count(workers, "workers")
    # Python refuses to start a process by the same sign, once this one has begun its job.
    if workers > 1 and getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ValueError(
            f"Processes for workers={workers} import the script that starts them, which must not "
            "start them again. Put what the script does below `if __name__ == '__main__':`."
        )


@contextlib.contextmanager
def companions(model: ModelSource, job: Job, workers: int) -> Iterator[ModelSource]:
    """Run ``job`` in ``workers - 1`` further processes for as long as the body runs.

    The processor's threads are divided between the workers. Where ``model`` names no device, each
    takes a GPU in turn if there are any. A companion that fails does not stop the others; one of
    them repeats its unfinished trial. Companions end with this process, however it ends.

    Args:
        model: The model, which every worker loads.
        job: What every further worker does; this one's share is the body. All of them return when
            the study is complete.
        workers: Workers in all, this one included.

    Yields:
        The model as this worker has to load it.

    Raises:
        ValueError: As `check_workers`.
    """
    check_workers(workers)
    models = share_devices(model, workers, torch.cuda.device_count())
    threads = torch.get_num_threads()
    share = max(1, threads // workers)
    context = multiprocessing.get_context("spawn")
    processes: list[SpawnProcess] = []
    finished = False
    try:
        with _environment(OMP_NUM_THREADS=str(share)), _interrupts_blocked():
            for other in models[1:]:
                process = context.Process(target=_work, args=(job, other, share), daemon=True)
                process.start()
                processes.append(process)  # only one that was started can be waited for
        if processes:
            torch.set_num_threads(share)
        yield models[0]
        finished = True
    finally:
        torch.set_num_threads(threads)
        for process in processes:
            if not finished and process.is_alive():
                process.terminate()
            process.join()
    failed = sum(process.exitcode != 0 for process in processes)
    if failed:
        logger.warning("%d of %d workers failed; the others did their trials.", failed, workers)


@contextlib.contextmanager
def thread_count(count: int | None) -> Iterator[None]:
    """Let torch compute with ``count`` threads in the body; ``None``: with as many as it does."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def share_devices(model: ModelSource, workers: int, gpus: int) -> list[ModelSource]:
    """Return the model once per worker, each on a GPU of its own as far as there are enough."""
    if model.device_map is not None or workers == 1 or gpus == 0:
        return [model] * workers
    return [replace(model, device_map=f"cuda:{worker % gpus}") for worker in range(workers)]


def _work(job: Job, model: ModelSource, threads: int) -> None:
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr
    )
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, said to be leaked when this ends
    disable_progress_bar()  # what the first worker shows is enough
    job(model)


def _end_with_parent() -> None:
    """End this process when the one that started it has: killed, it cannot do that itself."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Start processes in the body without ``SIGINT``, and take it afterwards if it came meanwhile.

    A terminal sends it to all of its processes. The first worker ends the others then, which would
    otherwise print a traceback each.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # which is started with the first process, and unblocks it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
