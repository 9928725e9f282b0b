"""A small search in processes that are killed for real.

They are forked from one that has imported everything and done nothing: importing takes longer than
the search.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_adaptive_sparse.search.evaluator import Evaluator
from hf_adaptive_sparse.search.result import SearchResult
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.study import search

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__, "optuna.storages", "sqlalchemy"])


def small_search(storage: str | Path | None, **options: Any) -> SearchResult:
    """Search a tiny Llama, the same one each time."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).eval()
    generator = torch.Generator().manual_seed(5)
    batches = [{"input_ids": torch.randint(0, 64, (1, 24), generator=generator)} for _ in range(2)]
    space = SearchSpace(blocks=4, kv_bits=None)
    return search(
        model, batches[:1], batches[1:], space, storage=storage, progress=False, **options
    )


def run_together(
    storage: str | Path, log: Path, kill_at: Sequence[int], **options: Any
) -> list[tuple[float, int]]:
    """Search by several workers at once, which log the digest of each profile they evaluate.

    Args:
        storage: What they share.
        log: File that they append to.
        kill_at: For each worker, the evaluation in which it kills itself; 0: none.
        options: Of `search`.

    Returns:
        Best value and number of trials, as each worker that lived has them.
    """
    start, found = PROCESSES.Barrier(len(kill_at)), PROCESSES.SimpleQueue()
    workers = [
        PROCESSES.Process(
            target=_work, args=(storage, log, number, start, found, options), daemon=True
        )
        for number in kill_at
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=240)
    expected = [-signal.SIGKILL if number else 0 for number in kill_at]
    assert [worker.exitcode for worker in workers] == expected
    return [found.get() for number in kill_at if not number]


def _work(
    storage: str | Path,
    log: Path,
    kill_at: int,
    start: Barrier,
    found: SimpleQueue,
    options: dict[str, Any],
) -> None:
    torch.set_num_threads(1)
    original, calls = Evaluator.__call__, []

    def watched(self, candidate, reporter=None):
        calls.append(candidate.digest)
        with log.open("a") as file:
            file.write(candidate.digest + "\n")
        time.sleep(0.15)
        if len(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, candidate, reporter)

    Evaluator.__call__ = watched
    start.wait(timeout=120)
    result = small_search(storage, **options)
    found.put((result.best_value, len(result.history)))
