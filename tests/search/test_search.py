from __future__ import annotations

import json
import logging
import math
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import datasets
import optuna
import pytest
import torch
from accelerate import cpu_offload
from transformers import LlamaForCausalLM

from hf_adaptive_sparse.architecture import kv_widths, prunable_weights
from hf_adaptive_sparse.evaluation.perplexity import perplexity
from hf_adaptive_sparse.profiles import CalibrationConfig, CompressionProfile, KVCacheConfig
from hf_adaptive_sparse.pruning.apply import prune_model
from hf_adaptive_sparse.search import evaluator as evaluator_module
from hf_adaptive_sparse.search.errors import SearchError, StorageError, TrialFailure, TrialsFailed
from hf_adaptive_sparse.search.evaluation_result import Evaluation
from hf_adaptive_sparse.search.evaluator import Evaluator
from hf_adaptive_sparse.search.result import SearchResult
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.storage import quiet_optuna
from hf_adaptive_sparse.search.study import STUDY_NAME, search
from tests.families.tiny_models import tiny_model
from tests.processors import make_tokenizer

SPACE = SearchSpace(blocks=4, kv_group_size=16, kv_residual_length=8)


@pytest.fixture
def evaluation():
    generator = torch.Generator().manual_seed(7)
    return [{"input_ids": torch.randint(5, 128, (2, 32), generator=generator)} for _ in range(2)]


@pytest.fixture
def run(tiny_llama, text_batches, evaluation):
    def call(**changes) -> SearchResult:
        arguments = {"space": SPACE, "n_trials": 6, "progress": False} | changes
        model = arguments.pop("model", tiny_llama)
        calibration = arguments.pop("calibration", text_batches)
        scored = arguments.pop("evaluation", evaluation)
        return search(model, calibration, scored, **arguments)

    return call


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def valued(value):
    return Evaluation((value,), batches=2, of_batches=2)


def zeros(model):
    """Zero weights of each linear as the forward sees them, masks included."""
    linears = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    return tuple(int((linear.weight == 0).sum()) for linear in linears)


def assert_same(model, before):
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def without_time(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def test_the_uniform_profile_comes_first_and_is_the_baseline(run):
    result = run()
    first = result.history[0]
    assert first["uniform"]
    assert first["block_ratios"] == [0.5] * 4
    assert first["key_bits"] == first["value_bits"] == [8, 6, 8, 6]
    assert result.baseline == first["value"]
    assert not any(row["uniform"] for row in result.history[1:])
    assert result.best_value == min(row["value"] for row in result.history)


def test_every_profile_meets_the_budget_as_counted_on_the_masks(run, tiny_llama, monkeypatch):
    removed, bits = [], []
    original = Evaluator.score

    def counting(self, index, candidate, settings):
        removed.append(sum(zeros(self.model)))
        bits.append(candidate.kv_cache.mean_bits(kv_widths(self.model.config)))
        return original(self, index, candidate, settings)

    monkeypatch.setattr(Evaluator, "score", counting)
    run(n_trials=8, warm_start=False)
    total = sum(m.weight.numel() for m in prunable_weights(tiny_llama).values())
    assert len(removed) == 8 * 2  # batches
    assert set(removed) == {round(total * 0.5)}
    assert set(bits) == {7.0}


@pytest.mark.parametrize("target", [0.3, 0.37, 0.61])
def test_any_target_is_met_to_the_weight(run, tiny_llama, target):
    result = run(space=SearchSpace(target_sparsity=target, blocks=3, kv_bits=None), n_trials=4)
    numel = {name: m.weight.numel() for name, m in prunable_weights(tiny_llama).items()}
    for trial in result.study.trials:
        ratios = trial.user_attrs["profile"]["sparsity"]
        counts = [round(ratios[name] * n) for name, n in numel.items()]
        assert sum(counts) == round(target * sum(numel.values()))
        assert abs(trial.user_attrs["mean_sparsity"] - target) <= 1e-4


def test_the_same_seed_gives_the_same_history_and_another_seed_another(run):
    first, second, other = run(n_trials=14), run(n_trials=14), run(n_trials=14, seed=1)
    assert without_time(first.history) == without_time(second.history)
    assert without_time(first.history) != without_time(other.history)


def test_the_best_value_follows_from_its_profile_by_hand(run, tiny_llama, text_batches, evaluation):
    result = run()
    profile = result.best_profile
    prune_model(
        tiny_llama,
        ratios=profile.sparsity.ratios,
        batches=text_batches,
        sequential=False,
        progress=False,
    )
    assert perplexity(tiny_llama, evaluation, profile.kv_cache) == result.best_value


def test_the_model_is_bit_identical_afterwards(run, tiny_llama):
    before = snapshot(tiny_llama)
    tiny_llama.train()
    run()
    assert_same(tiny_llama, before)
    assert tiny_llama.training


def test_the_model_is_bit_identical_after_an_exception(run, tiny_llama, monkeypatch):
    before = snapshot(tiny_llama)
    calls = []

    def failing(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return valued(10.0 + len(calls))

    monkeypatch.setattr(Evaluator, "measure", failing)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert_same(tiny_llama, before)
    assert optuna.logging.get_verbosity() == optuna.logging.INFO


def test_weights_are_ranked_once(run, monkeypatch):
    calls = []
    original = evaluator_module.rank_model
    monkeypatch.setattr(
        evaluator_module, "rank_model", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    run()
    assert calls == [1]


def test_what_is_held_besides_the_model_is_within_its_bound(tiny_llama, run, monkeypatch):
    held = []
    original = evaluator_module.masked

    class Watched:
        def __init__(self, *arguments):
            self.context = original(*arguments)

        def __enter__(self):
            self.mask = self.context.__enter__()
            return self.mask

        def __exit__(self, *error):
            held.append(self.mask.nbytes)
            return self.context.__exit__(*error)

    monkeypatch.setattr(evaluator_module, "masked", Watched)
    run(n_trials=3)
    numels = [m.weight.numel() for m in prunable_weights(tiny_llama).values()]
    margin = 2 / min(numels)
    bound = sum(4 * math.ceil((0.1 + margin) * n) + 2 * math.ceil(n / 8) for n in numels)
    assert held == [pytest.approx(bound, rel=0.01)]
    assert held[0] <= bound + 8 * len(numels)
    assert held[0] < sum(numels) + 2 * 0.1 * sum(numels)


def test_a_profile_is_evaluated_once(run, monkeypatch):
    calls = Counter()
    original = Evaluator.measure

    def counting(self, candidate, reporter):
        evaluation = original(self, candidate, reporter)
        calls[zeros(self.model)] += 1
        return evaluation

    monkeypatch.setattr(Evaluator, "measure", counting)
    # Two blocks on a grid of three: shifting both alike changes nothing, so draws collide.
    space = SearchSpace(blocks=2, sparsity_range=0.025, kv_bits=None)
    result = run(space=space, n_trials=4, warm_start=False)
    assert set(calls.values()) == {1}
    assert len(calls) == 4
    duplicates = [row for row in result.history if row["duplicate_of"] is not None]
    assert duplicates
    for row in duplicates:
        assert row["value"] == result.history[row["duplicate_of"]]["value"]
        assert row["seconds"] is None


def test_an_exhausted_space_ends_the_search_and_says_so(run, caplog):
    space = SearchSpace(blocks=2, sparsity_range=0.025, kv_bits=None)
    with caplog.at_level(logging.WARNING):
        result = run(space=space, n_trials=50)
    distinct = {tuple(row["block_ratios"]) for row in result.history}
    assert len(distinct) == 5  # differences of -2 ... 2 steps
    assert "The search stopped at 5 of 50 trials" in caplog.text


def test_kv_bits_alone_leave_the_weights_alone(run, monkeypatch):
    monkeypatch.setattr(evaluator_module, "rank_model", None)
    space = SearchSpace(target_sparsity=None, kv_group_size=16, kv_residual_length=8)
    result = run(space=space, n_trials=4)
    assert result.best_profile.sparsity is None
    assert result.best_config.target_sparsity == 0.0
    assert all(row["mean_kv_bits"] == 7 for row in result.history)
    assert all(row["mean_sparsity"] is None for row in result.history)


def test_sparsity_alone_leaves_the_cache_alone(run):
    result = run(space=SearchSpace(blocks=4, kv_bits=None), n_trials=3)
    assert result.best_profile.kv_cache is None
    assert result.best_config.kv_cache is None


def test_one_width_is_fixed_while_ratios_are_searched(run):
    result = run(space=SearchSpace(blocks=4, kv_bits=8), n_trials=3)
    assert all(row["key_bits"] == [8] * 4 for row in result.history)


def test_fixed_ratios_while_kv_bits_are_searched(run):
    space = SearchSpace(sparsity_range=0, kv_group_size=16, kv_residual_length=8)
    result = run(space=space, n_trials=3)
    assert all(row["block_ratios"] == [0.5] * 4 for row in result.history)
    assert len({tuple(row["key_bits"]) for row in result.history}) > 1


@pytest.mark.parametrize(
    ("granularity", "groups", "varied"),
    [
        ("layer", 4, "layers"),
        ("block-projection", 14, "roles"),
        ("layer-projection", 28, "both"),
    ],
)
def test_ratios_are_shared_by_what_the_granularity_says(
    run, tiny_llama, granularity, groups, varied
):
    space = SearchSpace(blocks=2, granularity=granularity, kv_bits=None, sparsity_high=0.6)
    result = run(space=space, n_trials=3)
    total = sum(m.weight.numel() for m in prunable_weights(tiny_llama).values())
    for row, trial in zip(result.history, result.study.trials, strict=True):
        assert len(row["block_ratios"]) == groups
        ratios = trial.user_attrs["profile"]["sparsity"]
        numel = {n: m.weight.numel() for n, m in prunable_weights(tiny_llama).items()}
        assert sum(round(ratios[n] * numel[n]) for n in numel) == round(total / 2)
    ratios = result.study.trials[1].user_attrs["profile"]["sparsity"]
    by_layer = {
        layer: {round(r, 3) for n, r in ratios.items() if f".{layer}." in n} for layer in range(4)
    }
    if varied == "layers":
        assert all(len(found) == 1 for found in by_layer.values())
    else:
        assert all(len(found) > 1 for found in by_layer.values())
    if varied == "roles":
        assert by_layer[0] == by_layer[1]


def test_a_free_split_finds_any_width_under_an_exact_mean(run, tiny_llama):
    space = SearchSpace(
        target_sparsity=None,
        kv_bits=(2, 3, 4, 6, 8, 16),
        kv_mean_bits=4,
        kv_apart=True,
        kv_group_size=16,
        kv_residual_length=8,
    )
    result = run(space=space, n_trials=6)
    assert result.history[0]["key_bits"] == result.history[0]["value_bits"] == [4] * 4
    seen = set()
    for row, trial in zip(result.history, result.study.trials, strict=True):
        profile = KVCacheConfig.from_dict(trial.user_attrs["profile"]["kv_cache"])
        assert profile.mean_bits(kv_widths(tiny_llama)) == row["mean_kv_bits"] == 4
        seen |= set(row["key_bits"]) | set(row["value_bits"])
    assert len(seen) > 3


def test_excluded_modules_stay_dense_and_do_not_count(run, tiny_llama):
    excluded = ["*.mlp.down_proj"]
    result = run(modules_to_not_convert=excluded)
    ratios = result.best_profile.sparsity.ratios
    assert list(ratios) == list(prunable_weights(tiny_llama, excluded))
    numel = {n: m.weight.numel() for n, m in prunable_weights(tiny_llama, excluded).items()}
    assert result.best_profile.sparsity.mean(numel) == pytest.approx(0.5, abs=1e-5)
    assert result.best_config.modules_to_not_convert == excluded


def test_a_vision_language_model_is_searched(tiny_llava, image_batches):
    result = search(tiny_llava, image_batches, image_batches[:2], SPACE, n_trials=3, progress=False)
    assert all(".language_model." in name for name in result.best_profile.sparsity.ratios)


def test_metrics_without_data_need_no_calibration(run):
    assert run(metric="magnitude", calibration=None, n_trials=2).calibration is None


def test_applying_prunes_to_the_profile_and_keeps_the_kv_profile(run, tiny_llama):
    result = run()
    report = result.apply(tiny_llama, progress=False)
    assert report.mean_sparsity == pytest.approx(0.5, abs=1e-5)
    carried = tiny_llama.config.quantization_config
    assert dict(carried.sparsity) == dict(result.best_profile.sparsity.ratios)
    assert carried.kv_cache == result.best_profile.kv_cache
    found = carried.provenance["search"]
    assert found["one_shot_perplexity"] == result.best_value
    assert found["trials"] == 6


def test_saving_writes_profile_and_history_and_nothing_else(run, tmp_path):
    result = run()
    result.save(tmp_path / "new")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["profile.json", "search.json"]
    assert SearchResult.load_profile(tmp_path / "new") == result.best_profile
    assert CompressionProfile.load(tmp_path / "new/profile.json") == result.best_profile
    stored = SearchResult.load_history(tmp_path / "new")
    assert stored["history"] == json.loads(json.dumps(result.history))
    assert stored["best_value"] == result.best_value
    assert stored["uniform_value"] == result.baseline


def test_a_save_that_fails_leaves_no_temporary_file(run, tmp_path):
    (tmp_path / "search.json").mkdir()
    with pytest.raises(OSError, match=r"search\.json"):
        run().save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["profile.json", "search.json"]


def test_a_history_has_the_version_of_studies_not_that_of_profiles(run, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_adaptive_sparse.search.result.STUDY_FORMAT", 2)
    run().save(tmp_path)
    assert SearchResult.load_history(tmp_path)["format_version"] == 2


def test_a_history_from_the_future_is_refused(run, tmp_path):
    (tmp_path / "search.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="Upgrade"):
        SearchResult.load_history(tmp_path)


def test_a_failed_trial_is_kept_with_its_reason_and_the_search_goes_on(run, monkeypatch, caplog):
    original = Evaluator.measure
    calls = []

    def sometimes(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no room")
        if len(calls) == 4:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate")
        return valued(float("nan")) if len(calls) == 3 else original(*arguments)

    monkeypatch.setattr(Evaluator, "measure", sometimes)
    result = run(n_trials=7)
    failed = [row for row in result.history if row["state"] == "fail"]
    assert [row["failure"].split(":")[0] for row in failed] == [
        "Out of memory",
        "The perplexity is nan.",
        "Out of memory",
    ]
    assert len(result.history) == 7
    assert "Trial 2 failed: The perplexity is nan." in caplog.text


def test_another_error_is_not_swallowed(run, monkeypatch):
    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Evaluator, "measure", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run()


def test_when_nearly_all_trials_fail_the_search_stops_and_says_why(run, monkeypatch):
    calls = []

    def failing(*_):
        calls.append(1)
        raise TrialFailure("the loss is nan", repeatable=False)

    monkeypatch.setattr(Evaluator, "measure", failing)
    with pytest.raises(SearchError, match=r"5 of 5 trials failed.*the loss is nan \(5 of 5"):
        run(n_trials=50)
    assert len(calls) == 5


def test_when_no_trial_succeeds_it_is_an_error(run, monkeypatch):
    monkeypatch.setattr(Evaluator, "measure", lambda *_: valued(math.inf))
    with pytest.raises(SearchError, match=r"No trial succeeded.*perplexity is inf"):
        run(n_trials=2)


def test_equal_values_are_remarked_on(run, monkeypatch, caplog):
    monkeypatch.setattr(Evaluator, "measure", lambda *_: valued(42.0))
    result = run()
    assert "All 6 profiles have the same perplexity, 42.0" in caplog.text
    assert result.best_trial.number == 0


def test_weights_that_are_not_finite_are_named(run, tiny_llama):
    tiny_llama.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj"):
        run()


def test_states_that_no_cache_can_hold_fail_the_trial(run, tiny_llama):
    batch = {"input_ids": torch.randint(5, 128, (2, 32))}
    tiny_llama.model.embed_tokens.weight.data[batch["input_ids"][0, 3]] = torch.nan
    with pytest.raises(TrialsFailed, match=r"5 of 5 trials failed.*keys of layer 0 must be finite"):
        run(evaluation=[batch], metric="magnitude")


def test_datasets_in_memory_are_searched_on(run):
    rows = [{"text": f"the cat number {i} sat on the mat. " * 40} for i in range(3)]
    data = datasets.Dataset.from_list(rows)
    with pytest.raises(ValueError, match="calibration is a dataset, which needs processor="):
        run(calibration=data)
    result = run(calibration=data, evaluation=data, processor=make_tokenizer(), n_trials=1)
    assert result.calibration_config is None
    assert math.isfinite(result.best_value)


def test_an_encoder_of_features_is_searched(run, tiny_whisper, caplog):
    def batch(rows):
        ids = torch.randint(5, 99, (rows, 16))
        sounds = torch.randn(rows, 8, 32)
        return {"input_features": sounds, "decoder_input_ids": ids, "labels": ids.roll(-1, 1)}

    batches = {"calibration": [batch(2)], "evaluation": [batch(2), batch(1)]}
    result = run(model=tiny_whisper, n_trials=3, **batches)
    assert len(result.history) == 3
    assert "fills a block" not in caplog.text


def test_weak_evaluations_are_warned_of(run, text_batches, caplog):
    tiny = [{"input_ids": torch.randint(5, 128, (1, 6))}]
    run(n_trials=1, evaluation=tiny)
    assert "a single window" in caplog.text
    assert "Evaluation data: No window (longest: 6 tokens)" in caplog.text
    run(n_trials=1, evaluation=text_batches)
    assert "Calibration and evaluation data are the same" in caplog.text


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"n_trials": 0}, ValueError, "n_trials must be a whole number >= 1, got 0"),
        ({"n_trials": 2.0}, ValueError, "n_trials must be a whole number >= 1"),
        ({"timeout_seconds": 0}, ValueError, "timeout_seconds must be a number > 0 or None, got 0"),
        ({"sampler": None}, ValueError, "sampler must be one of tpe, .*, got None"),
        ({"seed": -1}, ValueError, "seed must be a whole number >= 0"),
        ({"modules_to_not_convert": "*.mlp.*"}, ValueError, "must be a list of module names"),
        ({"metric": "lognrm"}, ValueError, "lognorm"),
        ({"metric": "sparsegpt"}, ValueError, "cannot rank weights once"),
        ({"space": 0.5}, TypeError, "space must be a SearchSpace, got float"),
        ({"space": SearchSpace(blocks=1, kv_bits=None)}, SearchError, "nothing to choose"),
        ({"space": SearchSpace(sparsity_range=0, kv_bits=8)}, SearchError, "nothing to choose"),
        ({"storage": "study.txt"}, ValueError, r"\.log, \.journal"),
        ({"storage": "/no/such/folder/s.log"}, StorageError, "folder of the storage"),
        ({"storage": "sqlite:////no/such/folder/s.db"}, StorageError, "cannot be used"),
        ({"storage": "nodialect://host/db"}, StorageError, "cannot be used"),
        ({"calibration": []}, ValueError, "empty"),
        ({"evaluation": []}, ValueError, "empty"),
        ({"evaluation": "wiki.txt"}, ValueError, "evaluation names a dataset.*processor="),
        ({"calibration": CalibrationConfig()}, ValueError, "calibration names a dataset"),
        ({"modules_to_not_convert": ["*"]}, ValueError, "No linear is left"),
        ({"modules_to_not_convert": ["nothing.*"]}, ValueError, "matches none"),
    ],
)
def test_bad_input_is_refused_with_the_way_out(run, changes, error, message):
    with pytest.raises(error, match=message):
        run(**changes)


def test_a_single_trial_of_a_space_without_choice_is_the_uniform_profile(run):
    result = run(space=SearchSpace(blocks=1, kv_bits=None), n_trials=1)
    assert result.baseline == result.best_value


def test_a_search_ends_after_its_time_but_never_without_a_profile(run, monkeypatch):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr("hf_adaptive_sparse.search.study.monotonic", lambda: next(clock))
    monkeypatch.setattr("hf_adaptive_sparse.search.runner.monotonic", lambda: next(clock))
    assert len(run(n_trials=50, timeout_seconds=35, warm_start=False).history) == 4
    states = [row["state"] for row in run(n_trials=50, timeout_seconds=1e-9).history]
    assert states.count("complete") == len(states) - states.count("waiting") == 1


def test_a_sampler_of_the_users_own_is_used(run):
    result = run(sampler=optuna.samplers.RandomSampler(seed=3), n_trials=3)
    assert isinstance(result.study.sampler, optuna.samplers.RandomSampler)


@pytest.mark.parametrize("value", ["high", "0.5", None, math.nan, math.inf, 9.0, 1e300, [0.5]])
def test_a_set_parameter_that_nothing_draws_fails_its_trial_once(run, value, caplog):
    study = {"storage": optuna.storages.InMemoryStorage(), "early_stopping": False}
    params = run(**study).best_trial.params
    optuna.load_study(study_name=STUDY_NAME, storage=study["storage"]).enqueue_trial(
        {name: value for name in params}
    )
    rows = run(**study, n_trials=9).history
    failed = [row for row in rows if row["failure"] is not None]
    assert [row["number"] for row in failed] == [6]
    assert "must be a number from 0.45 to 0.55, got " + repr(value) in failed[0]["failure"]
    assert failed[0]["failure"] in caplog.text
    assert [row["state"] for row in rows].count("complete") == 8
    assert len(run(**study, n_trials=9).history) == 9


@pytest.mark.parametrize("target", [1 / 3, 2 / 3])
def test_a_target_of_many_digits_has_a_baseline(run, target):
    space = SearchSpace(target, sparsity_low=target, sparsity_high=0.8, blocks=4, kv_bits=None)
    result = run(space=space, n_trials=1)
    assert result.history[0]["block_ratios"] == pytest.approx([target] * 4, abs=1e-12)
    assert result.baseline is not None


def test_a_set_parameter_in_range_is_tried(run):
    study = {"storage": optuna.storages.InMemoryStorage()}
    params = run(**study, n_trials=1).best_trial.params
    first, *others = params
    wish = {first: 0.55} | dict.fromkeys(others, 0.5)
    optuna.load_study(study_name=STUDY_NAME, storage=study["storage"]).enqueue_trial(wish)
    assert run(**study, n_trials=2, warm_start=False).history[1]["block_ratios"][0] > 0.5


def test_a_best_profile_that_is_worse_on_held_out_data_is_told(run, monkeypatch):
    losses = Evaluator.losses

    def worse(self, candidate, windows):
        more = 0.0 if candidate.digest == self.uniform.digest else 1.0
        return [(loss + more * tokens, tokens) for loss, tokens in losses(self, candidate, windows)]

    monkeypatch.setattr(Evaluator, "losses", worse)
    held_out = [{"input_ids": torch.arange(32).reshape(4, 8)}]
    figures, verdict, *_ = run(held_out=held_out).lines
    assert "(uniform): +" in figures
    assert verdict.startswith("On held-out data the best profile is worse than the uniform one")


def test_an_odd_number_of_layers_splits_one_layer(run, tiny_llama):
    config = type(tiny_llama.config)(**(tiny_llama.config.to_dict() | {"num_hidden_layers": 3}))
    model = LlamaForCausalLM(config).eval()
    result = run(model=model, n_trials=3)
    for trial in result.study.trials:
        kv_cache = KVCacheConfig.from_dict(trial.user_attrs["profile"]["kv_cache"])
        pairs = list(zip(kv_cache.key_bits, kv_cache.value_bits, strict=True))
        assert sorted(pairs) == [(6, 6), (8, 6), (8, 8)]


def test_kv_bits_are_searched_with_offloaded_weights(run, tiny_llama):
    space = SearchSpace(target_sparsity=None, kv_group_size=16, kv_residual_length=8)
    expected = run(space=space, n_trials=2)
    cpu_offload(tiny_llama, execution_device=torch.device("cpu"))
    assert tiny_llama.model.layers[0].mlp.up_proj.weight.is_meta
    result = run(space=space, n_trials=2)
    assert result.fingerprint == expected.fingerprint
    assert without_time(result.history) == without_time(expected.history)


@pytest.mark.parametrize(
    "space",
    [
        SearchSpace(kv_bits=None),
        SearchSpace(target_sparsity=None, kv_bits=None, weight_bits=(4, 8), weight_mean_bits=6),
    ],
    ids=["ratios", "weight bits"],
)
def test_offloaded_weights_are_refused_where_they_are_searched(run, tiny_llama, tmp_path, space):
    cpu_offload(tiny_llama, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"q_proj' is offloaded; .* Load the model without"):
        run(space=space, storage=tmp_path / "study.journal")
    assert not list(tmp_path.iterdir())


def test_kv_bits_are_refused_where_generate_makes_a_cache_of_another_kind():
    batches = [{"input_ids": torch.arange(24).view(2, 12) + 100}]
    with pytest.raises(ValueError, match=r"MiniMaxForCausalLM makes one of its own.*kv_bits"):
        search(tiny_model("minimax"), batches, batches, n_trials=2, progress=False)


def test_a_name_is_no_model(run):
    with pytest.raises(TypeError, match=r"model must be a model in memory, got str. Load it"):
        run(model="llava-hf/llava-1.5-7b-hf")


def test_two_threads_do_not_search_one_model(run, monkeypatch):
    begun, refused = threading.Event(), threading.Event()
    measure = Evaluator.measure

    def waiting(*arguments):
        begun.set()
        assert refused.wait(60)
        return measure(*arguments)

    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(Evaluator, "measure", waiting)
        first = pool.submit(run, n_trials=2)
        assert begun.wait(60)
        with pytest.raises(ValueError, match="another thread searches this one"):
            run(n_trials=2)
        refused.set()
        disturbed = first.result(60)
    assert without_time(disturbed.history) == without_time(run(n_trials=2).history)


def test_searches_in_threads_leave_the_verbosity_of_optuna_as_it_was():
    before = optuna.logging.get_verbosity()
    first, second = quiet_optuna(), quiet_optuna()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert optuna.logging.get_verbosity() == optuna.logging.ERROR
    second.__exit__(None, None, None)
    assert optuna.logging.get_verbosity() == before
