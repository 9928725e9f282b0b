"""Do profiles found on text or on images serve videos, and those found on text sounds?

On the two models of `media_models.py`, for every kind of data that each of them takes: a profile is
searched with that kind of data alone, as somebody would who has no other; then everything is scored
on held-out questions about the model's own medium. Three things are told apart: which data the
weights are ranked on (calibration), which the ratios are found on (search), and both together.
Masks are one-shot, differences are taken batch by batch against the uniform profile calibrated on
the own medium, and their 95 % intervals are of a bootstrap over batches.

The KV cache is left out: these sequences hardly fill one of its blocks, so its bits cost nothing
that could be measured.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from clips import clip_lesson, picture_lesson
from environment import RESULTS, write_result
from lessons import MakeLesson, write_questions
from media_models import KINDS, trained
from open_questions import OneShot, layer_ratios, one_shot_masks, ratios_of
from paired import Scores, score, scores_against
from tones import sound_lesson
from transformers import AutoModelForMultimodalLM, PreTrainedModel

from hf_adaptive_sparse.calibration.data import Batch
from hf_adaptive_sparse.compressor import DataSource
from hf_adaptive_sparse.demo.scenes import HELD_OUT_SEEDS, make_text
from hf_adaptive_sparse.report import markdown_table
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.study import search

logger = logging.getLogger(__name__)

TEXT = "text"
DATA: Mapping[str, Mapping[str, MakeLesson | None]] = {
    "video": {"clips": clip_lesson, "pictures": picture_lesson, TEXT: None},
    "audio": {"sounds": sound_lesson, TEXT: None},
}
"""Model -> the kinds of data that it takes, its own medium first; ``None``: the demo's prose."""

PARTS = ("calibration", "search", "held_out")
TARGETS = (0.5, 0.6, 0.7)
SUFFERS = 0.02
"""Share of the questions that the uniform profile must lose for a target to be worth a search."""
WELL_TRAINED = 0.8
"""Accuracy below which a model's rows say little, and the table says so."""
WINDOW = 256


def make_data(work: Path, name: str, options: argparse.Namespace) -> dict[str, dict[str, Path]]:
    """Write what is calibrated, searched and scored on, of seeds that training never uses."""
    sizes = (options.calibration, options.search, options.held_out)
    found: dict[str, dict[str, Path]] = {}
    for kind, make in DATA[name].items():
        found[kind] = {}
        for offset, (part, size) in enumerate(zip(PARTS, sizes, strict=True)):
            path = work / "data" / f"{kind}-{part}-{size}.parquet"
            seed = HELD_OUT_SEEDS + 100 + offset
            if make is not None:
                write_questions(path, make, size, seed)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                # A paragraph has some 80 tokens: enough for as many windows as are taken.
                pq.write_table(pa.table({"text": make_text(4 * size, seed)}), path)
            found[kind][part] = path
    return found


def transfer(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Answer the question for one model."""
    folder = trained(name, options.work, options.steps)
    processor = KINDS[name].processor()

    def load() -> PreTrainedModel:
        return AutoModelForMultimodalLM.from_pretrained(folder).eval()

    config = load().config

    files = make_data(options.work, name, options)
    own = next(iter(files))

    def batches(kind: str, part: str) -> list[Batch]:
        size = getattr(options, part)
        if kind == TEXT:  # a window has about as many tokens as the sequences of four questions
            data = DataSource(files[kind][part], size // 4, WINDOW, batch_size=2)
        else:
            data = DataSource(files[kind][part], size, batch_size=8)
        return data.batches(processor, config, "validation")

    seen = {kind: (batches(kind, "calibration"), batches(kind, "search")) for kind in files}
    held_out = batches(own, "held_out")

    dense = score(load(), held_out)
    on_others = {
        kind: score(load(), seen[kind][1]).accuracy for kind in files if kind not in (own, TEXT)
    }
    with one_shot_masks(load(), seen[own][0]) as one_shot:
        uniform = {target: uniform_scores(one_shot, target, held_out) for target in TARGETS}
    target = chosen_target(dense, uniform)
    logger.info("%s: accuracy %.3f dense; target %.0f %%", name, dense.accuracy, 100 * target)

    space = SearchSpace(target_sparsity=target, kv_bits=None)
    profiles: dict[str, dict[str, float]] = {}
    for kind, (calibration, searched) in seen.items():
        for seed in options.seeds:
            result = search(
                load(),
                calibration,
                searched,
                space,
                n_trials=options.trials,
                seed=seed,
                progress=False,
            )
            profiles[f"{kind}, seed {seed}"] = ratios_of(result)
            logger.info("%s: searched on %s, seed %d", name, kind, seed)

    baseline = f"uniform, calibrated on {own}"
    scores = {"dense": dense, baseline: uniform[target]}
    for kind, (calibration, _) in seen.items():
        with one_shot_masks(load(), calibration) as one_shot:
            if kind != own:
                title = f"uniform, calibrated on {kind}"
                scores[title] = uniform_scores(one_shot, target, held_out)
            for found, ratios in profiles.items():
                if kind == own or found.startswith(kind):
                    one_shot.handle.apply(ratios)
                    title = f"searched on {found}, calibrated on {kind}"
                    scores[title] = score(one_shot.model, held_out)
    model = load()
    return {
        "model": config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training": json.loads((folder / "recipe.json").read_text(encoding="utf-8")),
        "own": own,
        "accuracy_on_other_data": on_others,
        "uniform_by_target": scores_against(
            {"dense": dense, **{f"{t:.0%}": s for t, s in uniform.items()}}, "dense"
        ),
        "target_sparsity": target,
        "rows": scores_against(scores, baseline),
        "profiles": {found: layer_ratios(model, ratios) for found, ratios in profiles.items()},
    }


def uniform_scores(one_shot: OneShot, target: float, held_out: Sequence[Batch]) -> Scores:
    one_shot.uniform(target)
    return score(one_shot.model, held_out)


def chosen_target(dense: Scores, uniform: Mapping[float, Scores]) -> float:
    """Return the lowest target at which the uniform profile loses `SUFFERS`, or the highest."""
    suffers = [t for t, one in uniform.items() if dense.accuracy - one.accuracy >= SUFFERS]
    return min(suffers, default=max(uniform))


def table(answers: Mapping[str, Any]) -> str:
    lines = [
        "# Profiles across media",
        "",
        "Written by `benchmarks/media_transfer.py`; machine, versions, seeds and sizes are in the "
        "JSON beside this file. Loss in nats per token of the answers; gaps against the uniform "
        "profile calibrated on the model's own medium, with 95 % intervals of a bootstrap over "
        "held-out batches.",
    ]
    for name, answer in answers.items():
        lines += ["", f"## The {name} model", "", *_about(answer), "", _rows(answer["rows"])]
        lines += ["", "Mean ratio per decoder layer:", "", _profiles(answer["profiles"])]
    return "\n".join(lines)


def _about(answer: Mapping[str, Any]) -> list[str]:
    by_target = answer["uniform_by_target"]
    told = ", ".join(
        f"{row['accuracy']:.1%} {'dense' if target == 'dense' else f'at {target}'}"
        for target, row in by_target.items()
    )
    others = "".join(
        f" It answers {accuracy:.1%} of the questions about {kind}."
        for kind, accuracy in answer["accuracy_on_other_data"].items()
    )
    recipe = answer["training"]["recipe"]
    caution = ""
    if by_target["dense"]["accuracy"] < WELL_TRAINED:
        caution = (
            f" **It was trained for too short a time** (wanted: {WELL_TRAINED:.0%} right), so what "
            "follows is provisional."
        )
    return [
        f"`{answer['model']}`, {answer['parameters'] / 1e6:.1f} M parameters, trained in "
        f"{recipe['steps']} steps. Held-out questions about {answer['own']} that it answers right: "
        f"{told} (uniform).{others} Searched at {answer['target_sparsity']:.0%}: the lowest of "
        f"{', '.join(f'{t:.0%}' for t in TARGETS)} at which the uniform profile loses at least "
        f"{SUFFERS:.0%} of the answers, or else the highest.{caution}",
    ]


def _rows(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = []
    for name, row in rows.items():
        (low, high), (fewer, more) = row["interval"], row["accuracy_interval"]
        lines.append(
            {
                "": name,
                "loss": f"{row['loss']:.4f}",
                "gap": f"{row['gap']:+.4f} ({low:+.4f} … {high:+.4f})",
                "accuracy": f"{row['accuracy']:.1%}",
                "gap in points": f"{100 * row['accuracy_gap']:+.1f} "
                f"({100 * fewer:+.1f} … {100 * more:+.1f})",
            }
        )
    return markdown_table(lines)


def _profiles(profiles: Mapping[str, Sequence[float]]) -> str:
    return markdown_table(
        [
            {"searched on": name, "ratios": " ".join(f"{ratio:.3f}" for ratio in ratios)}
            for name, ratios in profiles.items()
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir(), "media-models"),
        help="folder of models and data, where what is trained already is used (%(default)s)",
    )
    parser.add_argument("--only", nargs="*", choices=list(DATA), default=list(DATA))
    parser.add_argument("--steps", type=int, help="of training; default: the recipe's")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--calibration", type=int, default=128, help="questions")
    parser.add_argument("--search", type=int, default=128, help="questions")
    parser.add_argument("--held-out", type=int, default=512, help="questions")
    parser.add_argument("--name", default="media_transfer", help="name of the result files")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    answers: dict[str, Any] = {}
    before = RESULTS / f"{options.name}.json"
    if before.is_file():  # of the models that do not run now
        kept = json.loads(before.read_text(encoding="utf-8"))["answers"]
        answers = {name: kept[name] for name in DATA if name in kept and name not in options.only}
    for name in options.only:
        started = perf_counter()
        answers[name] = transfer(name, options)
        answers[name]["seconds"] = perf_counter() - started
        answers[name]["options"] = {
            key: value for key, value in vars(options).items() if key not in ("work", "only")
        }
        ordered = {name: answers[name] for name in DATA if name in answers}
        write_result(options.name, {"answers": ordered}, table(ordered))


if __name__ == "__main__":
    main()
