"""What the benchmarks of GPU kernels share: their device, their clocks, and a contract in parallel.

Compiling a kernel takes seconds and a contract asks for hundreds, so its cases are spread over
processes, one per core, which share the device. Nothing is timed meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from environment import installed_version, write_result

from hf_adaptive_sparse.kernels import triton_device

Checks = list[tuple[str, float]]
"""What was checked, and its error as a share of the bound."""


def parser(description: str) -> argparse.ArgumentParser:
    """Return the options that all of these benchmarks have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--rehearse", action="store_true", help="tiny sizes, nothing is written")
    return made


def parser_with_contract(description: str) -> argparse.ArgumentParser:
    """Return the same with a way to measure only."""
    made = parser(description)
    made.add_argument("--skip-contract", action="store_true", help="measure only")
    return made


def find_device(parser: argparse.ArgumentParser, rehearse: bool) -> torch.device:
    """Return the GPU, or the CPU where Triton's interpreter rehearses; exit where there is none."""
    if not torch.cuda.is_available() and not (rehearse and triton_device.interprets()):
        parser.error("this needs a CUDA device (or TRITON_INTERPRET=1 and --rehearse)")
    if not triton_device.is_available():
        parser.error(
            "this needs Triton (pip install 'hf-adaptive-sparse[gpu]') and a GPU it serves, and "
            f"HF_ADAPTIVE_SPARSE_KERNEL other than {os.environ.get('HF_ADAPTIVE_SPARSE_KERNEL')!r}"
        )
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def triton_version() -> str | None:
    return installed_version("triton")


def say(row: Any) -> None:
    """Show what was measured at once: a run may be cut off before its end."""
    print(row, file=sys.stderr, flush=True)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(device: torch.device, function: Callable[[], Any]) -> float:
    """Return what a call takes, the device's work included."""
    synchronise(device)
    started = time.perf_counter()
    function()
    synchronise(device)
    return 1000 * (time.perf_counter() - started)


def best_seconds(
    functions: Sequence[Callable[[], Any]], device: torch.device, repeats: int = 5
) -> float:
    """Seconds of one of the functions, on average over all, in the fastest of several passes."""
    passes = []
    for _ in range(repeats + 1):  # the first compiles
        synchronise(device)
        started = time.perf_counter()
        for function in functions:
            function()
        synchronise(device)
        passes.append((time.perf_counter() - started) / len(functions))
    return min(passes[1:])


def record(functions: Sequence[Callable[[], Any]]) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    """Record calls, after one each in which kernels are compiled and tiles measured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for function in functions:
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [function() for function in functions]
    return graph, outputs


def seconds_of(functions: Sequence[Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Microseconds of a call: on the device, and with what Python takes to make it."""
    alone = best_seconds(functions, device)
    if device.type != "cuda":
        return {"device_us": alone * 1e6, "call_us": alone * 1e6}
    graph, outputs = record(functions)
    recorded = best_seconds([graph.replay], device) / len(functions)
    del graph, outputs
    return {"device_us": recorded * 1e6, "call_us": alone * 1e6}


def copy_bandwidth(device: torch.device, size_bytes: int) -> float:
    """Bytes per second, read and written, of a large copy on the device."""
    source = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size_bytes / best_seconds([lambda: target.copy_(source)] * 4, device)


def check_contract(
    check: Callable[[Any, torch.device], Checks], cases: Iterable[Any], device: torch.device
) -> dict[str, Any]:
    """Check all cases, and say how near to the bound they came and what failed.

    Args:
        check: A function of a module, of a case and the device; raises where a case cannot be had.
        cases: What it takes; picklable, and told by ``str``.
        device: With a GPU, cases are spread over processes.
    """
    started = time.perf_counter()
    cases = list(cases)
    outcomes = list(_outcomes(check, cases, device))
    checks = list(itertools.chain.from_iterable(found for found, _ in outcomes))
    failures = [error for _, error in outcomes if error is not None]
    failures += [
        f"{name}: error is {share:.2f} of the bound" for name, share in checks if share > 1
    ]
    # What is not a number is above no bound.
    failures += [f"{name}: error is not a number" for name, share in checks if share != share]
    return {
        "cases": len(cases),
        "checked": len(checks),
        "seconds": round(time.perf_counter() - started, 1),
        "worst_share_of_bound": max((share for _, share in checks), default=0.0),
        "failures": len(failures),
        "first_failures": failures[:20],
    }


def compile_all(
    run: Callable[[Any, torch.device], Any], cases: Sequence[Any], device: torch.device
) -> None:
    """Run cases in processes, so that their kernels lie compiled on the disk for this one."""
    if device.type == "cuda":
        for _, error in _outcomes(run, cases, device):
            if error is not None:
                say(error)


def _outcomes(
    check: Callable[[Any, torch.device], Any], cases: Sequence[Any], device: torch.device
) -> Iterable[tuple[Any, str | None]]:
    numbered = list(enumerate(cases))
    tasks = ([check] * len(cases), numbered, [device] * len(cases))
    if device.type != "cuda":
        return map(_outcome, *tasks)
    workers = max(1, min(len(os.sched_getaffinity(0)), 14, len(cases)))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        return list(pool.map(_outcome, *tasks))


def _outcome(
    check: Callable[[Any, torch.device], Any], case: tuple[int, Any], device: torch.device
) -> tuple[Any, str | None]:
    torch.manual_seed(case[0])
    try:
        return check(case[1], device), None
    except Exception as error:  # recorded: one run must tell all that is wrong
        return [], f"{case[1]}: {type(error).__name__}: {error}"[:500]


def nothing_checked() -> dict[str, Any]:
    """Return what stands in place of a contract that was skipped."""
    return {"checked": 0, "failures": 0, "first_failures": []}


def verdict(contract: dict[str, Any]) -> str:
    """Say what became of the contract."""
    if not contract["checked"]:
        return "The contract was not checked in this run."
    return f"Contract: {contract['checked']} checks, {contract['failures']} failures."


def finish(name: str, result: dict[str, Any], table: str, rehearse: bool) -> int:
    """Write and print what was found; return the exit status, 1 where the contract is broken."""
    if not rehearse:
        write_result(name, result, table)
    print(table)
    for failure in result["contract"]["first_failures"]:
        print(failure, file=sys.stderr)
    return 1 if result["contract"]["failures"] else 0
