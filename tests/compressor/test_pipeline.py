"""The main job, whole: a folder goes in, a complete compressed repo comes out, or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoProcessor,
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlavaProcessor,
    PreTrainedModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import hf_adaptive_sparse as has
from hf_adaptive_sparse.calibration import data as load_data
from hf_adaptive_sparse.calibration.records import DataError
from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.compressor import DataSource, compress, pruned_folder
from hf_adaptive_sparse.compressor.checks import check_goal
from hf_adaptive_sparse.compressor.model_source import ModelSource
from hf_adaptive_sparse.compressor.pruned_folder import prune_to_folder
from hf_adaptive_sparse.compressor.saving import copy_processor
from hf_adaptive_sparse.evaluation import vqa
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.storage import JOURNAL
from hf_adaptive_sparse.staging import OutputError
from tests.processors import make_tokenizer


@pytest.fixture
def data(text_file: Path) -> DataSource:
    return DataSource(text_file, num_samples=8, sequence_length=32, batch_size=4)


def test_leaves_a_complete_repo_that_loads_and_generates(
    llava_folder: Path, data: DataSource, question_file: Path, tmp_path: Path
) -> None:
    (llava_folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# Dense\n")
    output = tmp_path / "out"
    result = compress(
        llava_folder,
        output,
        n_trials=4,
        calibration=data,
        evaluation=data,
        questions=replace(data, source=question_file),
        progress=False,
    )
    names = {path.name for path in output.iterdir()}
    assert names >= {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "profile.json",
        "profile.png",
        "search.json",
        "search.png",
        "tokenizer.json",
    }
    card = ModelCard.load(output / "README.md")
    assert card.data.license == "apache-2.0"
    assert "Perplexity on text.txt, accuracy on 4 questions of questions.jsonl." in card.text
    assert not list(tmp_path.glob("*.partial"))
    dense, compressed = result.measurements
    assert dense.sparsity == 0.0
    assert compressed.sparsity == pytest.approx(0.5, abs=1e-4)
    assert compressed.weight_bytes < dense.weight_bytes
    assert compressed.accuracy is not None
    assert len(json.loads((output / "search.json").read_text())["history"]) >= 4

    model = has.AutoModelForVision2Seq.from_pretrained(output)
    assert has.sparsity_report(model).mean_sparsity == pytest.approx(0.5, abs=1e-4)
    bits = model.config.quantization_config.kv_cache.layer_bits(4)
    assert sum(k + v for k, v in bits) == 7 * 2 * 4
    processor = AutoProcessor.from_pretrained(output)
    inputs = processor(text="line", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]
    # What compress measured is what the folder gives back.
    held_out = replace(data, num_samples=16).batches(processor, model.config, "validation")
    again = has.perplexity(model, held_out[len(held_out) // 2 :])
    assert again == pytest.approx(compressed.perplexity, rel=1e-6)


@pytest.mark.parametrize(
    ("there", "batch_size", "asked"), [(4, 1, [2, 3]), (4, 4, [2, 3]), (1, 4, [0])]
)
def test_no_question_that_was_searched_on_is_asked(
    llava_folder: Path, question_file: Path, tmp_path: Path, monkeypatch, there, batch_size, asked
) -> None:
    """Where there is a single one, there is no other question to ask."""
    question_file.write_text("\n".join(question_file.read_text().splitlines()[:there]))
    rows: dict[str, list[str]] = {"read": [], "asked": []}

    def noting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **settings: Any) -> Any:
            chunk = next(one for one in arguments if isinstance(one, list))
            rows[name] += [row["place"] for row in chunk]
            return original(*arguments, **settings)

        return wrapped

    monkeypatch.setattr(load_data, "question_batch", noting("read", load_data.question_batch))
    monkeypatch.setattr(vqa, "generate_answers", noting("asked", vqa.generate_answers))
    result = compress(
        llava_folder,
        tmp_path / "out",
        config=SparsityConfig(metric="magnitude"),
        n_trials=1,
        evaluation=DataSource(question_file, num_samples=2, batch_size=batch_size),
        progress=False,
    )
    assert len(rows["read"]) == there
    expected = [rows["read"][index] for index in asked]
    assert rows["asked"] == expected * 2  # of the dense model, then of the compressed one
    assert [row.questions for row in result.measurements] == [len(asked)] * 2


def test_the_result_can_be_read_after_the_journal_has_moved(
    llava_folder: Path, data: DataSource, tmp_path: Path
) -> None:
    result = compress(
        llava_folder,
        tmp_path / "out",
        n_trials=3,
        calibration=data,
        evaluation=data,
        progress=False,
    )
    assert json.loads(json.dumps(result.to_dict()))["uniform_value"] == result.search.baseline


def test_a_failure_after_the_search_resumes_it_and_leaves_no_half_output(
    llava_folder: Path, data: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("killed here")

    arguments = {"n_trials": 3, "calibration": data, "evaluation": data, "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(pruned_folder, "save_model", fail)
        with pytest.raises(RuntimeError, match="killed here"):
            compress(llava_folder, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
    left = tmp_path / "out.adaptive-sparse.partial"
    assert [path.name for path in left.iterdir()] == [JOURNAL]

    before = (left / JOURNAL).read_text()
    result = compress(llava_folder, tmp_path / "out", **arguments)
    assert len(result.search.history) == 3
    # No trial was run again: the journal holds what it held, but for the study being opened.
    after = (tmp_path / "out" / JOURNAL).read_text()
    assert after.startswith(before)
    assert after.count('"op_code":4') == before.count('"op_code":4') == 3


def test_a_pattern_fixes_the_ratios_and_leaves_the_cache_to_search(
    llava_folder: Path, data: DataSource, tmp_path: Path
) -> None:
    config = SparsityConfig(pattern="2:4", metric="wanda")
    result = compress(
        llava_folder,
        tmp_path / "out",
        config=config,
        n_trials=3,
        calibration=data,
        evaluation=data,
        progress=False,
    )
    assert result.config.pattern == "2:4"
    assert result.report.mean_sparsity == 0.5
    assert result.config.kv_cache.mean_bits([(32, 32)] * 4) == 7.0


def test_nothing_to_search_prunes_uniformly(
    llava_folder: Path, data: DataSource, tmp_path: Path
) -> None:
    space = SearchSpace(sparsity_range=0.0, kv_bits=(8,))
    result = compress(
        llava_folder,
        tmp_path / "out",
        space=space,
        calibration=data,
        evaluation=data,
        progress=False,
    )
    assert result.search is None
    assert result.config.kv_cache.layer_bits(4) == ((8, 8),) * 4
    assert set(result.report.ratios.values()) == {0.5}


def test_data_are_named_or_given_as_for_a_search(
    llava_folder: Path, text_file: Path, question_file: Path, text_batches, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in question_file.read_text().splitlines()]
    for row in rows:
        row["image"] = str(question_file.parent / row["image"])
    result = compress(
        llava_folder,
        tmp_path / "out",
        config=SparsityConfig(metric="lognorm"),
        space=SearchSpace(sparsity_range=0.0, kv_bits=(8,)),
        calibration=text_batches,
        evaluation=str(text_file),
        questions=datasets.Dataset.from_list(rows),
        progress=False,
    )
    assert result.config.provenance["calibration"] == "batches given in memory"
    assert [row.questions for row in result.measurements] == [4, 4]
    assert "Perplexity on text.txt, accuracy on 4" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("sparsity_range", [0.0, 0.05])
def test_the_configs_kv_profile_stays_where_the_space_leaves_the_cache_alone(
    llava_folder: Path, data: DataSource, tmp_path: Path, sparsity_range: float
) -> None:
    result = compress(
        llava_folder,
        tmp_path / "out",
        config=SparsityConfig(metric="magnitude", kv_cache=8),
        space=SearchSpace(sparsity_range=sparsity_range, kv_bits=None),
        n_trials=2,
        evaluation=data,
        progress=False,
    )
    assert result.config.kv_cache.layer_bits(4) == ((8, 8),) * 4
    saved = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert saved["kv_cache"]["key_bits"] == [8] * 4


def test_a_model_without_prunable_weights_takes_the_cache(data: DataSource, tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 128}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(
        tmp_path / "gpt2"
    )
    make_tokenizer().save_pretrained(tmp_path / "gpt2")
    result = compress(
        tmp_path / "gpt2",
        tmp_path / "out",
        config=SparsityConfig(target_sparsity=0.0),
        space=SearchSpace(target_sparsity=0.0, kv_bits=(8,)),
        evaluation=data,
        progress=False,
    )
    assert result.config.kv_cache.layer_bits(2) == ((8, 8),) * 2
    assert (tmp_path / "out/profile.png").exists()


def test_sparsegpt_prunes_what_another_metric_searched(
    llava_folder: Path, data: DataSource, tmp_path: Path
) -> None:
    result = compress(
        llava_folder,
        tmp_path / "out",
        config=SparsityConfig(metric="sparsegpt"),
        n_trials=2,
        calibration=data,
        evaluation=data,
        progress=False,
    )
    assert result.search.metric == "lognorm"
    assert result.config.metric == "sparsegpt"
    assert result.report.mean_sparsity == pytest.approx(0.5, abs=1e-4)


class TestRefusals:
    def test_output_that_is_not_empty(self, llava_folder: Path, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="must be empty"):
            compress(llava_folder, llava_folder)

    def test_a_model_that_is_compressed_already(
        self, llava_folder: Path, data: DataSource, tmp_path: Path
    ) -> None:
        space = SearchSpace(sparsity_range=0.0, kv_bits=None)
        arguments = {"space": space, "calibration": data, "evaluation": data, "progress": False}
        compress(llava_folder, tmp_path / "once", **arguments)
        with pytest.raises(ValueError, match="A dense model is needed"):
            compress(tmp_path / "once", tmp_path / "twice", **arguments)

    def test_targets_that_disagree(self, llava_folder: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"one target_sparsity, got 0\.5 and 0\.4"):
            compress(llava_folder, tmp_path / "out", space=SearchSpace(target_sparsity=0.4))

    @pytest.mark.parametrize(
        ("what", "given", "error", "message"),
        [
            ("calibration", 3, ValueError, "calibration must be a dataset's name.* got int"),
            ("evaluation", {}, ValueError, "evaluation must be a dataset's name.* got dict"),
            ("questions", 1.0, ValueError, "questions must be a dataset's name.* got float"),
            ("questions", [], ValueError, "a datasets.Dataset or a DataSource, got list"),
            ("evaluation", [], DataError, "At least one batch"),
            ("calibration", ["a.txt"], TypeError, "batch 0 is str"),
        ],
    )
    def test_what_is_no_data_before_the_model_is_loaded(
        self, tmp_path: Path, what: str, given: object, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            compress("no/such/model", tmp_path / "out", **{what: given})

    def test_a_private_repo_that_is_not_pushed(self, llava_folder: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"no push_to_hub.*--push-to-hub REPO"):
            compress(llava_folder, tmp_path / "out", private=True)

    def test_bits_that_the_weights_do_not_take_before_the_search(
        self, llava_folder: Path, data: DataSource, tmp_path: Path
    ) -> None:
        arguments = {"calibration": data, "evaluation": data, "progress": False}
        with pytest.raises(ValueError, match=r"weight_bits=12 .* is torch\.float32"):
            compress(
                llava_folder, tmp_path / "out", config=SparsityConfig(weight_bits=12), **arguments
            )
        assert not list(tmp_path.glob("*.partial"))  # where a search leaves its journal

    def test_data_that_are_too_short(
        self, llava_folder: Path, tmp_path: Path, data: DataSource
    ) -> None:
        (tmp_path / "short.txt").write_text("too short")
        short = replace(data, source=tmp_path / "short.txt")
        with pytest.raises(DataError, match="32"):
            compress(llava_folder, tmp_path / "out", calibration=short, evaluation=data)
        assert not list(tmp_path.glob("*.partial"))


def test_the_dense_model_is_not_touched_by_a_failed_search(
    llava_folder: Path, data: DataSource, tmp_path: Path
) -> None:
    before = (llava_folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="n_trials"):
        compress(
            llava_folder,
            tmp_path / "out",
            n_trials=0,
            calibration=data,
            evaluation=data,
            progress=False,
        )
    assert (llava_folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("group_size", [None, 32])
def test_searched_widths_are_not_beside_fixed_ones(group_size: int | None) -> None:
    config = SparsityConfig(weight_bits=8, weight_group_size=group_size)
    space = SearchSpace(weight_bits=(4, 8, 16), weight_mean_bits=8.0)
    with pytest.raises(ValueError, match="groups of their own"):
        check_goal(config, space, None, 1)


def test_calibration_data_that_nothing_reads_are_not_named(
    llava_folder: Path, data: DataSource, tmp_path: Path
) -> None:
    result = compress(
        llava_folder,
        tmp_path / "out",
        config=SparsityConfig(metric="magnitude"),
        n_trials=2,
        calibration=DataSource(tmp_path / "missing.txt"),
        evaluation=data,
        progress=False,
    )
    assert result.config.provenance["calibration"] is None
    assert "missing.txt" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("job", ["prune", "prune --offload", "compress"])
def test_a_processor_that_cannot_be_loaded_here_is_in_the_folder_all_the_same(
    llava_folder: Path, text_file: Path, tmp_path: Path, monkeypatch, job: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ImportError("\nThis processor requires torchvision\nPlease install it")

    config, data = SparsityConfig(metric="magnitude"), DataSource(text_file, sequence_length=16)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoProcessor.from_pretrained", refuse)
        if job == "compress":
            out = tmp_path / "out"
            compress(llava_folder, out, config=config, n_trials=1, evaluation=data, progress=False)
        else:
            source = ModelSource(llava_folder)
            prune_to_folder(
                source, tmp_path / "out", config, offload=job.endswith("offload"), progress=False
            )
    written, whole = (
        AutoProcessor.from_pretrained(folder) for folder in (tmp_path / "out", llava_folder)
    )
    assert type(written) is type(whole) is LlavaProcessor
    assert written.to_dict() == whole.to_dict()


def test_no_processor_is_copied_whose_code_is_not(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    folder.mkdir()
    (source / "preprocessor_config.json").write_text('{"auto_map": {"AutoProcessor": "a.B"}}')
    copy_processor(ModelSource(source), folder)
    assert not list(folder.iterdir())


SMALL = {
    "d_model": 16,
    "vocab_size": 128,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(
    "dense",
    [
        BartForConditionalGeneration(BartConfig(**SMALL, max_position_embeddings=64)),
        WhisperForConditionalGeneration(WhisperConfig(**SMALL, num_mel_bins=8)),
    ],
    ids=lambda dense: dense.config.model_type,
)
def test_an_encoder_decoder_keeps_its_encoder(
    tmp_path: Path, dense: PreTrainedModel, offload: bool
) -> None:
    """transformers has a causal class of each, too, which is the decoder alone."""
    dense.save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    config = SparsityConfig(metric="magnitude")
    source, out = ModelSource(tmp_path / "dense"), tmp_path / "out"
    prune_to_folder(source, out, config, offload=offload, progress=False)
    pruned = ModelSource(out).load()
    assert type(pruned) is type(dense)
    encoders = (model.get_encoder().state_dict() for model in (dense, pruned))
    expected, found = encoders
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    loading = f"model = {type(dense).__name__}.from_pretrained(repo, dtype"
    assert loading in (out / "README.md").read_text()
