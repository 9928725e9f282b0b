"""The model card: a README.md with the Hub's metadata, how to use the model, and what was measured.

Everything that comes from elsewhere (names of models, of data, versions) is escaped before it is
written, and a local path is never published.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from hf_adaptive_sparse.files import replacing
from hf_adaptive_sparse.naming import CARD_NAME, UNNAMED_REPO, public_name
from hf_adaptive_sparse.profiles import KVCacheConfig
from hf_adaptive_sparse.report.snippets import IMAGE_SNIPPET, SOUND_SNIPPET, TEXT_SNIPPET
from hf_adaptive_sparse.report.tables import Row, escape_markdown, markdown_table

TAGS = ("adaptive-sparse", "sparsity", "pruning", "kv-cache")
_TAGS_OF_PRUNING = ("sparsity", "pruning")

PAPER = "https://arxiv.org/abs/2507.20613"

_WHY_PACKAGE = """\
The package must be installed: without it the checkpoint still loads, with a warning, but its
compressed weights are **initialised at random**."""

_PLAIN_WEIGHTS = """\
The weights of this checkpoint are plain, so it also loads without the plugin; the import is what
switches the quantised KV cache on."""

_DENSE_FORMAT = """\
This checkpoint stores the removed weights as zeros, so it also loads without the plugin; the
import is what switches the quantised KV cache on."""


@dataclass(frozen=True)
class CardFacts:
    """What a model card says.

    Attributes:
        base_model: Hub id of the dense model, or the path it was read from (not published).
        accepts_images: Whether the model takes images besides text.
        accepts_audio: Whether it takes sounds.
        text_class: Class of transformers that loads it, where it takes neither.
        repo_id: Where the model is going to be; None: the snippet has a placeholder.
        license: Metadata of the base model's license: ``license`` and, where they are needed,
            ``license_name`` and ``license_link``.
        prompt: Prompt of the usage snippet.
        checkpoint_format: "bitmask" or "dense".
        target_sparsity: Mean ratio that was asked for, over the prunable weights.
        achieved_sparsity: Mean ratio that was reached, over the same weights.
        metric: Pruning metric, and the weight update that follows it.
        pattern: "unstructured" or "n:m".
        kv_cache: KV profile, if there is one.
        kv_mean_bits: Its mean bits per element, weighted by width.
        weight_bits: Bits of the values of each module whose values take fewer than 16.
        calibration: Calibration data, in words.
        evaluation: Data of the perplexity, in words.
        questions: Data of the accuracy, in words.
        seed: Seed of the run.
        trials: Trials of the search; None: no search.
        versions: Library -> version.
        measurements: Rows of the measured table: column -> value.
        plots: Title -> file name inside the folder.
        bound: Sentences on the loss, where a bound on it was asked for.
    """

    base_model: str | None = None
    accepts_images: bool = False
    accepts_audio: bool = False
    text_class: str = "AutoModelForCausalLM"
    repo_id: str | None = None
    license: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None
    checkpoint_format: str = "bitmask"
    target_sparsity: float | None = None
    achieved_sparsity: float | None = None
    metric: str | None = None
    pattern: str = "unstructured"
    kv_cache: KVCacheConfig | None = None
    kv_mean_bits: float | None = None
    weight_bits: Mapping[str, int] = field(default_factory=dict)
    calibration: str | None = None
    evaluation: str | None = None
    questions: str | None = None
    seed: int | None = None
    trials: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    measurements: Sequence[Row] = ()
    plots: Mapping[str, str] = field(default_factory=dict)
    bound: str | None = None

    @property
    def base_name(self) -> str | None:
        """The base model's name as it may be published."""
        return None if self.base_model is None else public_name(self.base_model)

    @property
    def prunes(self) -> bool:
        """Whether weights were removed."""
        return self.target_sparsity != 0 or bool(self.achieved_sparsity)


def write_model_card(folder: str | os.PathLike[str], *, facts: CardFacts) -> Path:
    """Write ``README.md`` into a compressed model's folder, under a temporary name first.

    Args:
        folder: The model's folder. The plots that ``facts`` names must be in it.
        facts: What the card says.

    Returns:
        The path of the card.

    Raises:
        ValueError: If a plot is not in the folder.
    """
    folder = Path(folder)
    for name in facts.plots.values():
        if Path(name).is_absolute() or ".." in Path(name).parts or not (folder / name).is_file():
            raise ValueError(f"The model card names a plot {name!r} that is not in {folder}.")
    with replacing(folder / CARD_NAME) as partial:
        partial.write_text(model_card(facts), encoding="utf-8")
    return folder / CARD_NAME


def model_card(facts: CardFacts) -> str:
    """Return the card's text: metadata block and Markdown."""
    base = facts.base_name
    title = f"{base.rsplit('/', 1)[-1]}, compressed" if base else "Compressed model"
    if facts.repo_id:
        title = facts.repo_id.rsplit("/", 1)[-1]
    sections = [
        f"---\n{_metadata(facts)}\n---",
        f"# {escape_markdown(title)}",
        _summary(facts),
        f"## Use\n\n```python\n{_snippet(facts)}```\n\n{_why_import(facts)}",
    ]
    if facts.measurements:
        table = markdown_table(facts.measurements)
        bound = f"\n\n{escape_markdown(facts.bound)}" if facts.bound else ""
        sections.append(f"## Measured\n\n{_measured_on(facts)}{table}{bound}")
    sections.append(f"## How it was made\n\n{_recipe(facts)}")
    sections.extend(
        f"![{escape_markdown(plot)}]({_link(file)})" for plot, file in facts.plots.items()
    )
    sections.append(f"## Limits\n\n{_limits(facts)}")
    return "\n\n".join(sections) + "\n"


def _metadata(facts: CardFacts) -> str:
    base = facts.base_model if _is_repo_id(facts.base_model) else None
    return str(
        ModelCardData(
            base_model=base,
            library_name="transformers",
            license=facts.license.get("license"),
            license_name=facts.license.get("license_name"),
            license_link=facts.license.get("license_link"),
            pipeline_tag=_usage(facts)[0],
            tags=[tag for tag in TAGS if facts.prunes or tag not in _TAGS_OF_PRUNING],
        ).to_yaml()
    )


def _is_repo_id(name: str | None) -> bool:
    """Whether a base model is a Hub repo and not a local folder."""
    if name is None or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _summary(facts: CardFacts) -> str:
    base = facts.base_name
    linked = "a dense model" if base is None else escape_markdown(base)
    if base is not None and _is_repo_id(facts.base_model):
        linked = f"[{linked}](https://huggingface.co/{base})"
    parts = []
    if facts.achieved_sparsity is not None and facts.prunes:
        parts.append(f"{100 * facts.achieved_sparsity:.2f} % of its prunable weights removed")
    if facts.weight_bits:
        parts.append(f"weights of {_widths(facts.weight_bits)} bits")
    if facts.kv_cache is not None:
        bits = f" at {facts.kv_mean_bits:.4g} bits on average" if facts.kv_mean_bits else ""
        parts.append(f"its KV cache quantised layer by layer{bits}")
    what = f", with {' and '.join(parts)}" if parts else ""
    return f"This is {linked}{what}. Made with hf_adaptive_sparse, after [the paper]({PAPER})."


def _snippet(facts: CardFacts) -> str:
    _, template, default = _usage(facts)
    return template.format(
        repo=json.dumps(facts.repo_id or UNNAMED_REPO),
        prompt=json.dumps(facts.prompt or default),
        text_class=facts.text_class,
    )


def _usage(facts: CardFacts) -> tuple[str, str, str]:
    """Return the Hub's name of what the model does, the snippet that does it, and its prompt."""
    if facts.accepts_images:
        return "image-text-to-text", IMAGE_SNIPPET, "<image>\nWhat is in the picture?"
    if facts.accepts_audio:
        return "audio-text-to-text", SOUND_SNIPPET, "<audio>\nWhat do you hear?"
    return "text-generation", TEXT_SNIPPET, "Once upon a time"


def _measured_on(facts: CardFacts) -> str:
    """Return the sentence that names the data of the figures."""
    data = {"Perplexity": facts.evaluation, "accuracy": facts.questions}
    named = [f"{figure} on {escape_markdown(what)}" for figure, what in data.items() if what]
    return f"{', '.join(named)}.\n\n" if named else ""


def _why_import(facts: CardFacts) -> str:
    if facts.prunes and facts.checkpoint_format == "dense":
        return _DENSE_FORMAT
    return _WHY_PACKAGE if facts.prunes or facts.weight_bits else _PLAIN_WEIGHTS


def _recipe(facts: CardFacts) -> str:
    pruning: list[tuple[str, object]] = [
        ("Metric", facts.metric),
        ("Pattern", facts.pattern),
        ("Target sparsity", facts.target_sparsity),
        ("Achieved sparsity", facts.achieved_sparsity),
    ]
    entries: list[tuple[str, object]] = [
        ("Base model", facts.base_name),
        *(pruning if facts.prunes else [("Pruning", "none")]),
        ("Weight bits", _widths(facts.weight_bits) or None),
        ("Search", f"{facts.trials} trials" if facts.trials else "none"),
        ("Calibration", facts.calibration),
        ("Evaluation", facts.evaluation),
        ("Questions", facts.questions),
        ("Seed", facts.seed),
    ]
    if facts.kv_cache is not None:
        cache = facts.kv_cache.to_dict()
        for key, label in (("key_bits", "Key bits"), ("value_bits", "Value bits")):
            value = cache[key]
            text = ", ".join(map(str, value)) if isinstance(value, list) else f"{value}, all layers"
            entries.append((f"{label}, by layer", text))
        entries.append(("KV group size", cache["group_size"]))
    if facts.versions:
        versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
        entries.append(("Versions", versions))
    lines = [
        f"- {label}: {escape_markdown(f'{value:.6g}' if isinstance(value, float) else str(value))}"
        for label, value in entries
        if value is not None
    ]
    return "\n".join(lines)


def _limits(facts: CardFacts) -> str:
    lines = []
    if facts.prunes:
        lines.append(
            "Sparsity counts the weights of the language model's decoder layers; vision tower, "
            "projector, embeddings and output head are as dense as they were."
        )
    if facts.prunes and facts.checkpoint_format != "dense":
        lines.append(
            "The removed weights are gone from the files. The dense runtime has zeros in their "
            "places, the sparse runtime holds none."
        )
    lines += [
        "The figures above are of the data named with them; other tasks may lose more.",
        "The base model's intended uses, biases and license apply unchanged.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _widths(weight_bits: Mapping[str, int]) -> str:
    """Return the numbers of bits that occur, in words: ``"4 and 8"``."""
    return " and ".join(map(str, sorted(set(weight_bits.values()))))


def _link(file: str) -> str:
    return f"<{file}>" if not any(mark in file for mark in "<>\n") else ""
