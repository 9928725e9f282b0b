"""What a search costs: a trial against one evaluation pass, and the bytes held besides the model.

Passes and trials take turns, so that a busy machine slows both alike; medians are compared. A pass
is the perplexity of the unmasked model on the same batches, with the KV cache at the bits of the
search's baseline and without a cache. A trial is everything between its start and its end in the
study: draw, projection, masks, perplexity, storing.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from environment import shared, write_result
from optuna.storages import InMemoryStorage
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel

from hf_adaptive_sparse.calibration.data import Batch, load_batches
from hf_adaptive_sparse.evaluation.perplexity import perplexity
from hf_adaptive_sparse.profiles import CompressionProfile
from hf_adaptive_sparse.search.evaluator import open_evaluator
from hf_adaptive_sparse.search.shape import ModelShape
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.study import search
from hf_adaptive_sparse.search.suggesting import uniform_candidate

TIME_LIMIT = 1.3


def held_tensor_bytes() -> int:
    """Return the bytes of all tensors alive, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure_memory(
    model: PreTrainedModel,
    calibration: list[Batch],
    evaluation: list[Batch],
    space: SearchSpace,
    metric: str,
) -> dict[str, Any]:
    shape = ModelShape.of(model, space)
    candidate = uniform_candidate(space, shape)
    before = held_tensor_bytes()
    start = perf_counter()
    with open_evaluator(
        model,
        space,
        shape,
        candidate,
        calibration=calibration,
        evaluation=evaluation[:1],
        metric=metric,
        progress=False,
    ) as evaluator:
        ranking_seconds = perf_counter() - start
        evaluator(candidate)
        held = held_tensor_bytes() - before
    total = sum(shape.numel.values())
    ranked = sum(round(space.high * n) - round(space.low * n) for n in shape.numel.values())
    bound = ranked * model.dtype.itemsize + total
    return {
        "ranking_seconds": ranking_seconds,
        "prunable_weights": total,
        "weights_ranked_in_range": ranked,
        "held_bytes": held,
        "bound_bytes": bound,
        "held_within_bound": held <= bound,
        "held_bytes_per_weight": held / total,
    }


def measure_time(
    model: PreTrainedModel,
    calibration: list[Batch],
    evaluation: list[Batch],
    space: SearchSpace,
    options: argparse.Namespace,
) -> dict[str, Any]:
    storage = InMemoryStorage()
    plain: list[float] = []
    cached: list[float] = []
    trials: list[float] = []
    for repeat in range(options.repeats + 1):
        result = search(
            model,
            calibration,
            evaluation,
            space,
            metric=options.metric,
            n_trials=repeat + 1,
            storage=storage,
            seed=options.seed,
            early_stopping=False,
            progress=False,
        )
        first = CompressionProfile.from_dict(result.study.trials[0].user_attrs["profile"])
        for passes, kv_cache in ((plain, False), (cached, first.kv_cache)):
            start = perf_counter()
            perplexity(model, evaluation, kv_cache)
            passes.append(perf_counter() - start)
        duration = result.study.trials[-1].duration
        assert duration is not None  # it has ended
        trials.append(duration.total_seconds())
    # The first of each warms up.
    trial, with_cache, without = (median(times[1:]) for times in (trials, cached, plain))
    return {
        "trial_seconds": trial,
        "pass_seconds": with_cache,
        "pass_seconds_without_cache": without,
        "trial_over_pass": trial / with_cache,
        "trial_over_pass_without_cache": trial / without,
        "limit": TIME_LIMIT,
        "within_limit": trial <= TIME_LIMIT * with_cache,
        "all_seconds": {"trials": trials, "passes": cached, "passes_without_cache": plain},
        "best_perplexity": result.best_value,
        "uniform_perplexity": result.baseline,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="default: the shared tiny-llava")
    parser.add_argument("--text", type=Path, help="folder with calibration and evaluation.parquet")
    parser.add_argument("--calibration-windows", type=int, default=8)
    parser.add_argument("--evaluation-windows", type=int, default=6)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--metric", default="lognorm")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = parse()
    source = options.model or shared("models/tiny-llava")
    text = options.text or shared("data/wikitext2")
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=options.dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    calibration, evaluation = (
        load_batches(
            text / f"{name}.parquet",
            tokenizer,
            config=model.config,
            num_samples=windows,
            sequence_length=options.sequence_length,
            batch_size=options.batch_size,
            shuffle=False,
        )
        for name, windows in (
            ("calibration", options.calibration_windows),
            ("evaluation", options.evaluation_windows),
        )
    )
    space = SearchSpace()
    time = measure_time(model, calibration, evaluation, space, options)
    memory = measure_memory(model, calibration, evaluation, space, options.metric)
    settings = {key: value for key, value in vars(options).items() if key not in ("model", "text")}
    path = write_result(
        "search_cost",
        {"model": Path(source).name, "settings": settings, "time": time, "memory": memory},
    )
    print(
        f"trial {time['trial_seconds']:.2f} s, pass {time['pass_seconds']:.2f} s "
        f"({time['trial_over_pass']:.2f} x, limit {TIME_LIMIT}); without a cache "
        f"{time['pass_seconds_without_cache']:.2f} s "
        f"({time['trial_over_pass_without_cache']:.2f} x)"
    )
    print(
        f"held {memory['held_bytes']} bytes, bound {memory['bound_bytes']} "
        f"({memory['held_bytes_per_weight']:.3f} bytes per prunable weight)"
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
