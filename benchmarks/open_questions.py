"""The questions that the method leaves open, answered on the shared model with figures.

Each function answers one; ``--only`` runs some of them. Masks are one-shot (the gap to sequential
calibration is in `quality.md`), losses are compared batch by batch on held-out data that neither
calibration nor search saw, and intervals are 95 % of a bootstrap over batches: they say how sure a
difference is on this model and these data, not on others.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from ablation_metrics import register_variants
from environment import shared, write_result
from inputs import Inputs, add_inputs, read_inputs
from paired import Bootstrap, Losses, held_out_losses
from transformers import PreTrainedModel

from hf_adaptive_sparse.architecture import decoder_layers, layer_index, prunable_weights
from hf_adaptive_sparse.calibration.data import Batch
from hf_adaptive_sparse.compressor import DataSource
from hf_adaptive_sparse.profiles import KVCacheConfig
from hf_adaptive_sparse.pruning.apply import MaskedModel, masked, rank_model
from hf_adaptive_sparse.report import markdown_table
from hf_adaptive_sparse.search.result import SearchResult
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.study import search

logger = logging.getLogger(__name__)

TARGETS = (0.3, 0.4, 0.5, 0.6, 0.7)


@dataclass(frozen=True)
class Setting:
    """What every question works with.

    Attributes:
        inputs: Model and text.
        questions_seen: Batches of answered questions that a search may see.
        questions_held_out: Likewise, kept for the figures.
        trials: Trials of each search.
        seeds: Seeds of each search.
    """

    inputs: Inputs
    questions_seen: Sequence[Batch]
    questions_held_out: Sequence[Batch]
    trials: int
    seeds: Sequence[int]

    @property
    def held_out(self) -> Sequence[Batch]:
        """Text for the figures."""
        return self.inputs.data.held_out

    def found(
        self, space: SearchSpace, seed: int, evaluation: Sequence[Batch] | None = None
    ) -> SearchResult:
        """Search, on the text unless told otherwise."""
        return search(
            self.inputs.source.load_dense(),
            self.inputs.data.calibration,
            list(self.inputs.searched if evaluation is None else evaluation),
            space,
            n_trials=self.trials,
            seed=seed,
            progress=False,
        )

    @contextmanager
    def masks(self, metric: str = "lognorm") -> Iterator[OneShot]:
        """Yield the model under masks by a metric; dense until a ratio is set."""
        model = self.inputs.source.load_dense()
        with one_shot_masks(model, self.inputs.data.calibration, metric) as one_shot:
            yield one_shot


@dataclass(frozen=True)
class OneShot:
    """A model under one-shot masks.

    Attributes:
        model: The model.
        weights: Prunable linear -> its weight ``(out, in)`` beneath the mask.
        handle: Sets the masks.
    """

    model: PreTrainedModel
    weights: Mapping[str, torch.Tensor]
    handle: MaskedModel

    def uniform(self, ratio: float) -> None:
        """Give every linear one ratio."""
        self.handle.apply(dict.fromkeys(self.weights, ratio))


@contextmanager
def one_shot_masks(
    model: PreTrainedModel, calibration: Sequence[Batch], metric: str = "lognorm"
) -> Iterator[OneShot]:
    """Rank the model's weights, and yield it under masks; dense until a ratio is set."""
    rankings = rank_model(model, calibration, low=0.0, high=0.95, metric=metric, progress=False)
    weights = {name: m.weight.data for name, m in prunable_weights(model).items()}
    with masked(model, rankings) as handle:
        yield OneShot(model, weights, handle)


def ratios_of(result: SearchResult) -> dict[str, float]:
    profile = result.best_profile.sparsity
    if profile is None:
        raise RuntimeError("The search found no sparsity profile.")
    return dict(profile.ratios)


def compared(losses: Mapping[str, Losses], to: str, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Set losses against those of one row: perplexity, gap and its interval."""
    bootstrap = Bootstrap(len(losses[to].sums), seed)
    rows = {}
    for name, one in losses.items():
        gap, interval = bootstrap.gap(one, losses[to])
        rows[name] = {"perplexity": one.perplexity, "gap": gap, "interval": interval}
    return rows


def kv_splits(setting: Setting) -> dict[str, Any]:
    """How much does a free split of KV bits buy over an equal one, at the same mean?"""
    model = setting.inputs.source.load_dense()
    spaces: dict[str, SearchSpace] = {}
    for mean, palette in ((3, (2, 4)), (4, (2, 6)), (7, (6, 8))):
        only_kv = SearchSpace(target_sparsity=None, kv_bits=palette)
        spaces[f"mean {mean}, equal split of {palette[0]} and {palette[1]}"] = only_kv
        free = SearchSpace(
            target_sparsity=None,
            kv_bits=(2, 3, 4, 6, 8, 16),
            kv_mean_bits=float(mean),
            kv_apart=True,
        )
        spaces[f"mean {mean}, free split"] = free
    losses = {"16 bits": held_out_losses(model, setting.held_out, False)}
    for mean in (3, 4):
        losses[f"mean {mean}, all layers {mean}"] = held_out_losses(
            model, setting.held_out, KVCacheConfig(bits=mean)
        )
    for name, space in spaces.items():
        for seed in setting.seeds:
            profile = setting.found(space, seed).best_profile.kv_cache
            losses[f"{name}, seed {seed}"] = held_out_losses(model, setting.held_out, profile)
    return {"rows": compared(losses, "16 bits")}


def weight_bits(setting: Setting) -> dict[str, Any]:
    """Can weight bits join the search without fine-tuning?

    The same bytes, spent on fewer weights of 16 bits or on more of 8 or 4 bits, rounded to nearest
    in groups of 64 columns (8 bits: per row). A kept weight costs its bits and every weight one bit
    of mask; a dense one of 4 or 8 bits needs no mask.
    """
    with setting.masks() as one_shot:
        kept = {name: weight.clone() for name, weight in one_shot.weights.items()}
        losses: dict[str, Losses] = {}
        bits_per_weight: dict[str, float] = {}

        def measure(ratio: float, bits: int) -> None:
            for name, weight in one_shot.weights.items():
                weight.copy_(rounded(kept[name], bits))
            one_shot.uniform(ratio)
            name = f"{bits} bits, {ratio:.1%} sparse"
            scale = {16: 0.0, 8: 0.0, 4: 16 / 64}[bits]
            stored = (1 - ratio) * bits + scale + (1.0 if ratio else 0.0)
            bits_per_weight[name] = stored
            losses[name] = held_out_losses(one_shot.model, setting.held_out)

        measure(0.0, 16)
        dense = next(iter(losses))
        for budget in (9.0, 5.0, 4.25):
            for bits in (16, 8, 4):
                overhead = 1.0 + (16 / 64 if bits == 4 else 0.0)
                ratio = 1 - (budget - overhead) / bits
                if ratio <= 0.0 and bits + overhead - 1.0 <= budget:
                    measure(0.0, bits)
                elif 0.0 < ratio < 0.95:
                    measure(round(ratio, 4), bits)
    rows = compared(losses, dense)
    for name, row in rows.items():
        row["bits_per_weight"] = bits_per_weight[name]
    return {"rows": rows}


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Round to nearest, symmetrically, at 8 bits per row and at 4 per 64 columns."""
    if bits == 16:
        return weight
    width = weight.shape[1] if bits == 8 else 64
    top = 2 ** (bits - 1) - 1
    parts = []
    for part in weight.float().split(width, dim=1):
        scale = part.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / top
        parts.append((part / scale).round().clamp(-top - 1, top) * scale)
    return torch.cat(parts, dim=1).to(weight.dtype)


def transfer(setting: Setting) -> dict[str, Any]:
    """Does a profile found on text serve image questions, and the other way round?

    At 70 %, where the answers of this model begin to suffer. Losses on questions are those of the
    answers' tokens.
    """
    target = 0.7
    space = SearchSpace(target_sparsity=target, kv_bits=None)
    seen = {"text": setting.inputs.searched, "questions": setting.questions_seen}
    profiles = {
        f"searched on {kind}, seed {seed}": ratios_of(setting.found(space, seed, batches))
        for kind, batches in seen.items()
        for seed in setting.seeds
    }
    on_text: dict[str, Losses] = {}
    on_questions: dict[str, Losses] = {}
    with setting.masks() as one_shot:
        ratios = {"uniform": dict.fromkeys(one_shot.weights, target), **profiles}
        for name, one in ratios.items():
            one_shot.handle.apply(one)
            on_text[name] = held_out_losses(one_shot.model, setting.held_out)
            on_questions[name] = held_out_losses(one_shot.model, setting.questions_held_out)
    by_layer = {name: layer_ratios(one_shot.model, one) for name, one in profiles.items()}
    return {
        "target_sparsity": target,
        "text": compared(on_text, "uniform"),
        "questions": compared(on_questions, "uniform"),
        "profiles": by_layer,
    }


def lognorm_parts(setting: Setting) -> dict[str, Any]:
    """Is lognorm better than wanda with all else equal, and which of its parts earns it?"""
    answers = {}
    names = ["wanda", "ria", *register_variants(), "lognorm"]
    losses: dict[float, dict[str, Losses]] = {0.5: {}, 0.7: {}}
    for name in names:
        with setting.masks(name) as one_shot:
            for target, rows in losses.items():
                one_shot.uniform(target)
                rows[name] = held_out_losses(one_shot.model, setting.held_out)
    for target, rows in losses.items():
        answers[f"{target:.0%}"] = compared(rows, "wanda")
    return {"against_wanda": answers}


def shapes(setting: Setting) -> dict[str, Any]:
    """How do ratios spread from 30 to 70 %, and is the searched profile U-shaped?

    A profile that spares its ends has ratios that rise towards the middle. Tested by the rank
    correlation of a layer's ratio with its distance from the nearer end, over all orders of the
    layers (exact permutation test on the mean profile of the seeds).
    """
    answers = {}
    for target in TARGETS:
        space = SearchSpace(target_sparsity=target, kv_bits=None, sparsity_range=0.1)
        results = [setting.found(space, seed) for seed in setting.seeds]
        model = setting.inputs.source.load_dense()
        profiles = [layer_ratios(model, ratios_of(result)) for result in results]
        mean = [statistics.fmean(column) for column in zip(*profiles, strict=True)]
        correlation, chance = towards_middle(mean)
        answers[f"{target:.0%}"] = {
            "profiles": profiles,
            "mean": mean,
            "spread": [max(p) - min(p) for p in profiles],
            "gain_one_shot": [1 - r.best_value / (r.baseline or r.best_value) for r in results],
            "rank_correlation_with_distance_from_end": correlation,
            "chance_of_as_high": chance,
        }
    return {"by_target": answers}


def layer_ratios(model: PreTrainedModel, ratios: Mapping[str, float]) -> list[float]:
    """Return the mean ratio of each decoder layer, weighted by parameters."""
    name, layers = decoder_layers(model)
    removed, total = [0.0] * len(layers), [0] * len(layers)
    for linear, module in prunable_weights(model).items():
        index = layer_index(linear, name)
        removed[index] += ratios[linear] * module.weight.numel()
        total[index] += module.weight.numel()
    return [r / t for r, t in zip(removed, total, strict=True)]


def towards_middle(ratios: Sequence[float]) -> tuple[float, float]:
    """Return Spearman's correlation with the distance from the end, and its chance by luck."""
    distance = [min(i, len(ratios) - 1 - i) for i in range(len(ratios))]
    found = _spearman(ratios, distance)
    at_least = total = 0
    # Orders of up to eight layers: all of them; the ties of the distances make them few.
    for order in set(permutations(distance)):
        total += 1
        at_least += _spearman(ratios, order) >= found - 1e-12
    return found, at_least / total


def _spearman(first: Sequence[float], second: Sequence[float]) -> float:
    a, b = _ranks(first), _ranks(second)
    if len(set(a)) == 1:
        return 0.0
    return statistics.correlation(a, b)


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [statistics.fmean(i for i, v in enumerate(ordered) if v == x) for x in values]


QUESTIONS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "kv_splits": kv_splits,
    "weight_bits": weight_bits,
    "transfer": transfer,
    "lognorm_parts": lognorm_parts,
    "shapes": shapes,
}


def table(answers: Mapping[str, Any]) -> str:
    lines = [
        "# Open questions, answered on the shared model",
        "",
        "Written by `benchmarks/open_questions.py`; machine, versions, seeds and sizes are in the "
        "JSON beside this file. Gaps are in nats per token, with 95 % intervals of a bootstrap "
        "over held-out batches.",
    ]
    for name, answer in answers.items():
        lines += ["", f"## {(QUESTIONS[name].__doc__ or name).splitlines()[0]}", ""]
        lines += [*_paragraphs(name, answer), "", f"{answer['seconds']:.0f} s."]
    return "\n".join(lines)


def _paragraphs(name: str, answer: Mapping[str, Any]) -> list[str]:
    if name in ("kv_splits", "weight_bits"):
        return [_gap_table(answer["rows"])]
    if name == "transfer":
        return [
            f"At {answer['target_sparsity']:.0%}, against uniform. On held-out text:",
            "",
            _gap_table(answer["text"]),
            "",
            "On the answers to held-out questions:",
            "",
            _gap_table(answer["questions"]),
        ]
    if name == "lognorm_parts":
        lines = []
        for target, rows in answer["against_wanda"].items():
            lines += [f"Uniform {target}, gap to wanda (below 0 is better):", ""]
            lines += [_gap_table(rows), ""]
        return lines[:-1]
    rows = [
        {
            "target": target,
            "mean ratio per layer": " ".join(f"{ratio:.3f}" for ratio in one["mean"]),
            "highest - lowest": " ".join(f"{spread:.3f}" for spread in one["spread"]),
            "gain, one-shot": " ".join(f"{gain:.2%}" for gain in one["gain_one_shot"]),
            "correlation": f"{one['rank_correlation_with_distance_from_end']:+.2f}",
            "by chance": f"{one['chance_of_as_high']:.3f}",
        }
        for target, one in answer["by_target"].items()
    ]
    return [
        markdown_table(rows),
        "",
        "Correlation: of a layer's ratio with its distance from the nearer end; by chance: how "
        "often a random order of the layers does as well.",
    ]


def _gap_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = []
    for name, row in rows.items():
        low, high = row["interval"]
        line: dict[str, object] = {"": name}
        if "bits_per_weight" in row:
            line["bits per weight"] = f"{row['bits_per_weight']:.2f}"
        line["perplexity"] = f"{row['perplexity']:.3f}"
        line["gap"] = f"{row['gap']:+.4f} ({low:+.4f} … {high:+.4f})"
        lines.append(line)
    return markdown_table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=list(QUESTIONS), default=list(QUESTIONS))
    add_inputs(
        parser,
        calibration_windows=32,
        calibration_questions=128,
        search_windows=32,
        evaluation_windows=128,
        evaluation_questions=512,
    )
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--search-questions", type=int, default=256)
    parser.add_argument("--name", default="open_questions", help="name of the result files")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    inputs = read_inputs(options)
    # Small batches: the bootstrap resamples them.
    held_out = [
        {key: value[i : i + 2] for key, value in batch.items()}
        for batch in inputs.data.held_out
        for i in range(0, len(batch["input_ids"]), 2)
    ]
    inputs = replace(inputs, data=replace(inputs.data, held_out=held_out))
    visual = Path(options.visual) if options.visual else shared("data/easy-vqa")
    seen, unseen = (
        DataSource(visual / f"{part}.parquet", count, batch_size=16).batches(
            inputs.data.processor, inputs.source.load().config, "validation"
        )
        for part, count in (
            ("calibration", options.search_questions),
            ("evaluation", options.evaluation_questions),
        )
    )
    setting = Setting(inputs, seen, unseen, options.trials, options.seeds)
    answers: dict[str, Any] = {}
    for name in options.only:
        started = perf_counter()
        answers[name] = QUESTIONS[name](setting)
        answers[name]["seconds"] = perf_counter() - started
        logger.info("%s: %.0f s", name, answers[name]["seconds"])
        result = {
            "options": {key: str(value) for key, value in vars(options).items()},
            "held_out_tokens": sum(b["input_ids"].numel() for b in held_out),
            "held_out_batches": len(held_out),
            "answers": answers,
        }
        write_result(options.name, result, table(answers))


if __name__ == "__main__":
    main()
