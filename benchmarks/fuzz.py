"""How many bad inputs were tried on everything that reads what strangers wrote, and what happened?

Runs the targets of ``tests/fuzz/targets.py``: configs, profiles, headers, whole files, packed
tensors. Inputs are refused with a ValueError or accepted; anything else is a crash of ours, and the
input that caused it is printed and kept in the result. With ``--engine atheris``, libFuzzer's
coverage decides what is tried next; without, inputs are random.

    python benchmarks/fuzz.py [--executions 1000000] [--engine random|atheris] [--targets ...]
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from environment import write_result

from tests.fuzz import targets

LONGEST_INPUT = 80
SHOWN = 5


def fuzz_at_random(name: str, executions: int, seed: int) -> dict[str, Any]:
    """Run one target on random inputs."""
    rng = random.Random(f"{seed}:{name}")
    crashes: list[dict[str, str]] = []
    accepted, slowest, count = 0, 0.0, 0
    started = time.perf_counter()
    for index in range(executions):
        data = rng.randbytes(rng.randrange(LONGEST_INPUT))
        before = time.perf_counter()
        try:
            accepted += targets.run(name, data, measure_memory=index % 1000 == 0)
        except Exception as error:
            count += 1
            if len(crashes) < SHOWN:
                crashes.append({"input": data.hex(), "error": f"{type(error).__name__}: {error}"})
                print(f"{name}: {crashes[-1]}", file=sys.stderr, flush=True)
        slowest = max(slowest, time.perf_counter() - before)
    return {
        "executions": executions,
        "accepted": accepted,
        "crashes": count,
        "first_crashes": crashes,
        "slowest_ms": round(slowest * 1000, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }


def fuzz_with_atheris(name: str, executions: int, seed: int) -> dict[str, Any]:
    """Run one target under libFuzzer, which ends the process it runs in."""
    started = time.perf_counter()
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "import atheris\n"
        "with atheris.instrument_imports(include=['hf_adaptive_sparse']):\n"
        "    from tests.fuzz import targets\n"
        f"def execute(data):\n    targets.run({name!r}, data)\n"
        f"atheris.Setup(['fuzz', '-atheris_runs={executions}', '-seed={seed + 1}', "
        f"'-max_len={LONGEST_INPUT}', '-rss_limit_mb=4096', '-timeout=10'], execute)\n"
        "atheris.Fuzz()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    crashes = []
    if done.returncode:
        crashes = [{"error": done.stderr[-2000:]}]
        print(f"{name}: {done.stderr[-2000:]}", file=sys.stderr, flush=True)
    return {
        "executions": executions if not crashes else None,
        "crashes": len(crashes),
        "first_crashes": crashes,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--executions", type=int, default=1_000_000, help="over all targets")
    parser.add_argument("--engine", choices=("random", "atheris"), default="random")
    parser.add_argument("--targets", nargs="+", choices=targets.TARGETS, default=[*targets.TARGETS])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    fuzz = fuzz_at_random if options.engine == "random" else fuzz_with_atheris
    share = -(-options.executions // len(options.targets))
    rows = {}
    for name in options.targets:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows[name] = fuzz(name, share, options.seed)
    crashes = sum(row["crashes"] for row in rows.values())
    write_result("fuzz", {"engine": options.engine, "seed": options.seed, "targets": rows})
    print(f"{share * len(rows):,} executions, {crashes} crashes")
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
