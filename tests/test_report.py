"""Tables, plots and the model card."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from hf_adaptive_sparse.profiles import CompressionProfile, KVCacheConfig, SparsityProfile
from hf_adaptive_sparse.report import (
    CardFacts,
    escape_markdown,
    format_bytes,
    markdown_table,
    plot_history,
    plot_profile,
    text_table,
    write_model_card,
)
from hf_adaptive_sparse.report.layers import layer_of, mean_by_layer
from hf_adaptive_sparse.report.study_facts import StudyFacts
from tests import report_rows

ROWS = [
    {"Model": "dense", "Perplexity": 20.0, "Weights": "9.00 MB"},
    {"Model": "a|b", "Perplexity": 21.23456, "Weights": "5.10 MB", "Accuracy": None},
]


# Tables


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (4_513_000, "4.51 MB"),
        (13_500_000_000, "13.5 GB"),
        (2 * 10**18, "2000 PB"),
    ],
)
def test_format_bytes(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text


def test_format_bytes_refuses_negative_sizes() -> None:
    with pytest.raises(ValueError, match=r">= 0 bytes, got -1"):
        format_bytes(-1)


def test_markdown_table() -> None:
    assert markdown_table(ROWS, formats={"Perplexity": ".2f"}).splitlines() == [
        "| Model | Perplexity | Weights | Accuracy |",
        "| --- | ---: | ---: | --- |",
        "| dense | 20.00 | 9.00 MB | – |",
        "| a\\|b | 21.23 | 5.10 MB | – |",
    ]


def test_text_table() -> None:
    assert text_table(ROWS, columns=["Model", "Perplexity"]).splitlines() == [
        "Model  Perplexity",
        "-----  ----------",
        "dense          20",
        "a|b         21.23",
    ]
    assert text_table([{"n": 1234567, "flag": True}]).splitlines()[-1] == "1,234,567  True"


def test_empty_tables() -> None:
    assert markdown_table([]) == text_table([]) == ""


@pytest.mark.parametrize(
    "hostile",
    [
        "[click](https://evil.example)",
        "<script>alert(1)</script>",
        "x | y",
        "a\n# heading",
        "![i](x.png)",
        "`code`",
        "&lt;b&gt;",
        "__bold__",
        "https\\[x\\](y)",
    ],
)
def test_escape_markdown_leaves_no_markup(hostile: str) -> None:
    escaped = escape_markdown(hostile)
    assert "\n" not in escaped
    for place, char in enumerate(escaped):
        if char in "`*[]<>|#!~$&":
            # Escaped: an odd number of backslashes stands before it.
            before = escaped[:place]
            assert (len(before) - len(before.rstrip("\\"))) % 2 == 1


def test_escape_markdown_keeps_plain_names() -> None:
    assert escape_markdown("llava-hf/llava_1.5-7b-hf") == "llava-hf/llava_1.5-7b-hf"


# Layers


def test_layers_of_modules() -> None:
    assert layer_of("model.layers.3.mlp.experts.7.up") == ("model.layers", 3)
    assert layer_of("lm_head") is None
    ratios = {"m.layers.1.a": 0.2, "m.layers.1.b": 0.6, "m.layers.0.a": 0.5, "lm_head": 0.9}
    assert mean_by_layer(ratios)["m.layers"] == {0: 0.5, 1: pytest.approx(0.4)}
    numel = {"m.layers.1.a": 3, "m.layers.1.b": 1, "m.layers.0.a": 1}
    assert mean_by_layer(ratios, numel)["m.layers"][1] == pytest.approx(0.3)


# Plots


def profile(layers: int = 8) -> CompressionProfile:
    ratios = {
        f"model.layers.{layer}.{name}": 0.45 + 0.1 * layer / layers
        for layer in range(layers)
        for name in ("self_attn.q_proj", "mlp.up_proj")
    }
    bits = tuple(8 if layer % 2 else 6 for layer in range(layers))
    return CompressionProfile(SparsityProfile(ratios), KVCacheConfig(bits=bits))


def trials(count: int) -> StudyFacts:
    values = [12 - 0.01 * n + (n * 37 % 11) / 10 for n in range(count)]
    rows = [report_rows.row(n, value, uniform=n == 0) for n, value in enumerate(values)]
    for row in rows[3::7]:
        row |= {"state": "pruned", "value": None, "estimate": row["value"]}
    return report_rows.facts(rows)


def check_png(path: Path) -> bytes:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 300
        assert len(image.convert("L").resize((64, 64)).getcolors() or []) > 2
    assert path.stat().st_size < 100_000
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return path.read_bytes()


@pytest.mark.parametrize("count", [1, 50, 500])
def test_search_history_plot(tmp_path: Path, count: int) -> None:
    path = tmp_path / "history.png"
    plot_history(trials(count), path)
    first = check_png(path)
    plot_history(trials(count), path)
    assert path.read_bytes() == first


def test_history_without_values(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one complete trial"):
        plot_history(report_rows.facts([report_rows.row(0)]), tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layers", [1, 4, 80])
def test_profile_plot(tmp_path: Path, layers: int) -> None:
    path = tmp_path / "profile.png"
    plot_profile(profile(layers), path, target_sparsity=0.5)
    check_png(path)


def test_parts_of_a_profile(tmp_path: Path) -> None:
    whole = profile()
    plot_profile(CompressionProfile(sparsity=whole.sparsity), tmp_path / "p.png")
    check_png(tmp_path / "p.png")
    plot_profile(CompressionProfile(kv_cache=whole.kv_cache), tmp_path / "p.png")
    check_png(tmp_path / "p.png")
    one_number = CompressionProfile(kv_cache=KVCacheConfig(bits=8))
    plot_profile(one_number, tmp_path / "p.png", num_layers=4)
    check_png(tmp_path / "p.png")
    with pytest.raises(ValueError, match="num_layers="):
        plot_profile(one_number, tmp_path / "p.png")
    with pytest.raises(ValueError, match="it is empty"):
        plot_profile(CompressionProfile(), tmp_path / "p.png")


def test_a_plot_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "profile.png"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="per decoder layer"):
        plot_profile(profile(8), path, num_layers=9)
    assert path.read_bytes() == b"old"


# Model card


def facts(**changes: object) -> CardFacts:
    settings: dict[str, object] = {
        "base_model": "someone/llava-small",
        "accepts_images": True,
        "repo_id": "user/llava-sparse",
        "target_sparsity": 0.5,
        "achieved_sparsity": 0.50003,
        "metric": "lognorm",
        "kv_cache": KVCacheConfig(bits=(8, 6)),
        "kv_mean_bits": 7.0,
        "calibration": "wikitext, 128 windows",
        "evaluation": "WikiText-2 validation",
        "seed": 0,
        "trials": 50,
        "versions": {"torch": "2.13.0"},
        "measurements": ROWS,
    }
    return CardFacts(**{**settings, **changes})


def card_of(folder: Path, **changes: object) -> tuple[dict[str, object], str]:
    text = write_model_card(folder, facts=facts(**changes)).read_text(encoding="utf-8")
    _, metadata, body = text.split("---\n", 2)
    return yaml.safe_load(metadata), body


def snippet(body: str) -> str:
    return body.split("```python\n")[1].split("```")[0]


def test_card_metadata(tmp_path: Path) -> None:
    metadata, _ = card_of(tmp_path)
    assert metadata == {
        "base_model": "someone/llava-small",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["adaptive-sparse", "sparsity", "pruning", "kv-cache"],
    }
    metadata, _ = card_of(tmp_path, license={"license": "apache-2.0"}, accepts_images=False)
    assert (metadata["license"], metadata["pipeline_tag"]) == ("apache-2.0", "text-generation")
    assert ModelCard.load(tmp_path / "README.md").data.license == "apache-2.0"
    other = {"license": "other", "license_name": "ours", "license_link": "https://example.org/x"}
    metadata, _ = card_of(tmp_path, license=other)
    assert {key: metadata[key] for key in other} == other
    metadata, _ = card_of(tmp_path, accepts_images=False, accepts_audio=True)
    assert metadata["pipeline_tag"] == "audio-text-to-text"


@pytest.mark.parametrize(("images", "audio"), [(True, False), (False, False), (False, True)])
def test_snippet_imports_the_plugin_first(tmp_path: Path, images: bool, audio: bool) -> None:
    _, body = card_of(
        tmp_path, accepts_images=images, accepts_audio=audio, prompt='USER: <image>\n"What?"'
    )
    code = snippet(body)
    tree = ast.parse(code)
    assert isinstance(tree.body[0], ast.Import)
    assert tree.body[0].names[0].name == "hf_adaptive_sparse"
    assert "'user/llava-sparse'" in ast.unparse(tree)
    strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    assert 'USER: <image>\n"What?"' in strings
    assert "must be installed: without it" in body
    assert "initialised at random" in body


def test_card_body(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots/history.png").write_bytes(b"png")
    _, body = card_of(
        tmp_path,
        plots={"Search history": "plots/history.png"},
    )
    assert body.startswith("\n# llava-sparse\n")
    assert "50.00 % of its prunable weights removed" in body
    assert "at 7 bits on average" in body
    assert "| a\\|b |" in body
    assert "![Search history](<plots/history.png>)" in body
    for line in (
        "- Key bits, by layer: 8, 6",
        "- Seed: 0",
        "- Search: 50 trials",
    ):
        assert line in body.splitlines()


def test_card_names_the_data_of_each_figure(tmp_path: Path) -> None:
    _, body = card_of(tmp_path, evaluation="text.parquet")
    assert "\nPerplexity on text.parquet.\n" in body
    _, body = card_of(tmp_path, evaluation="text.parquet", questions="8 questions of vqa.parquet")
    assert "\nPerplexity on text.parquet, accuracy on 8 questions of vqa.parquet.\n" in body


def test_dense_format_says_that_it_loads_without_the_plugin(tmp_path: Path) -> None:
    _, body = card_of(tmp_path, checkpoint_format="dense")
    assert "also loads without the plugin" in body
    assert "initialised at random" not in body


@pytest.mark.parametrize("weight_bits", [{}, {"model.layers.0.mlp.up_proj": 8}])
def test_a_card_of_a_model_that_is_not_pruned_speaks_of_what_is_there(
    tmp_path: Path, weight_bits: dict[str, int]
) -> None:
    metadata, body = card_of(
        tmp_path, target_sparsity=0.0, achieved_sparsity=0.0, weight_bits=weight_bits
    )
    assert metadata["tags"] == ["adaptive-sparse", "kv-cache"]
    assert "its KV cache quantised layer by layer at 7 bits on average" in body
    assert "- Pruning: none" in body.splitlines()
    for word in ("removed", "lognorm", "unstructured", "parsity", "pruned"):
        assert word not in body
    assert ("initialised at random" in body) == bool(weight_bits)
    assert ("also loads without the plugin" in body) != bool(weight_bits)
    assert ("weights of 8 bits and its KV cache" in body) == bool(weight_bits)
    assert ("- Weight bits: 8" in body.splitlines()) == bool(weight_bits)


@pytest.mark.parametrize("exists", [True, False])
def test_local_paths_are_not_published(tmp_path: Path, exists: bool) -> None:
    base = tmp_path / "secret" / "my-model"
    if exists:
        base.mkdir(parents=True)
    metadata, body = card_of(tmp_path, base_model=str(base), repo_id=None)
    assert "base_model" not in metadata
    assert "secret" not in body
    assert body.startswith("\n# my-model, compressed")
    assert '"path/to/this/folder"' in body


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    hostile = "x](https://evil.example)\n---\nlicense: mit <img src=x>"
    metadata, body = card_of(
        tmp_path,
        base_model=hostile,
        repo_id=None,
        calibration=hostile,
        prompt="```\n# out",
    )
    assert set(metadata) == {"library_name", "pipeline_tag", "tags"}
    assert "](https://evil" not in body.replace("\\]", "")
    assert "<img" not in body.replace("\\<img", "")
    assert "# out" not in body.splitlines()


def test_card_refuses_plots_it_does_not_have(tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    outside.write_bytes(b"png")
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("absent.png", "../outside.png", str(outside)):
        with pytest.raises(ValueError, match="names a plot"):
            write_model_card(folder, facts=facts(plots={"Plot": name}))
    assert list(folder.iterdir()) == []
