"""The samplers by name, their seeds, and the evolutionary one."""

from __future__ import annotations

import sys

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from hf_adaptive_sparse.search.evolution import EvolutionSampler
from hf_adaptive_sparse.search.samplers import (
    DEFAULT_SAMPLER,
    as_sampler,
    register_sampler,
    sampler_maker,
    sampler_names,
)
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.study import search
from hf_adaptive_sparse.search.trials import DIGEST

LEVELS = {"low": 0.4, "high": 0.6, "step": 0.05}
UNITS = [f"sparsity_block_{unit}" for unit in range(6)]
LAYERS = [f"kv_priority_layer_{layer}" for layer in range(4)]
START = dict.fromkeys(UNITS, 0.5) | {name: place / 3 for place, name in enumerate(LAYERS)}


def draw(trial):
    trial.set_user_attr(DIGEST, str(trial.number))  # every draw is a profile of its own
    ratios = [trial.suggest_float(name, **LEVELS) for name in UNITS]
    priorities = [trial.suggest_float(name, 0.0, 1.0) for name in LAYERS]
    wanted = np.array([0.4, 0.6, 0.5, 0.5, 0.45, 0.55])
    return float(((np.array(ratios) - wanted) ** 2).sum() + 0.01 * priorities[0])


def run(sampler, trials, seed=0):
    study = optuna.create_study(sampler=as_sampler(sampler, seed))
    study.enqueue_trial(START)
    study.optimize(draw, n_trials=trials)
    return study


@pytest.fixture(autouse=True)
def quiet():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("name", sampler_names())
class TestEverySampler:
    def test_it_draws_within_the_space_and_by_its_seed(self, name):
        if name in ("gp", "cmaes"):
            pytest.importorskip({"gp": "scipy", "cmaes": "cmaes"}[name])
        first, second = run(name, 14), run(name, 14)
        assert [t.params for t in first.trials] == [t.params for t in second.trials]
        assert len({tuple(t.params.values()) for t in first.trials}) > 10
        assert len(run(name, 2, seed=2**40).trials) == 2
        if name != "random":
            other = run(name, 14, seed=1)
            assert [t.params for t in other.trials] != [t.params for t in first.trials]

    def test_a_search_takes_it_by_name(self, name, tiny_llama, text_batches):
        if name in ("gp", "cmaes"):
            pytest.importorskip({"gp": "scipy", "cmaes": "cmaes"}[name])
        result = search(
            tiny_llama,
            text_batches[:1],
            text_batches[1:2],
            SearchSpace(blocks=4),
            sampler=name,
            n_trials=4,
            progress=False,
        )
        assert len([row for row in result.history if row["state"] != "fail"]) >= 4


class TestNames:
    def test_an_unknown_name_lists_the_known_ones(self, tiny_llama, text_batches):
        with pytest.raises(ValueError, match=r"sampler must be one of tpe, .*evolution.*'best'"):
            search(tiny_llama, text_batches, text_batches, sampler="best")

    def test_a_missing_package_says_what_installs_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "cmaes", None)
        monkeypatch.setattr("hf_adaptive_sparse.search.samplers.find_spec", lambda _: None)
        with pytest.raises(ValueError, match=r"pip install 'hf-adaptive-sparse\[samplers\]'"):
            sampler_maker("cmaes")

    def test_a_name_is_registered_once(self):
        with pytest.raises(ValueError, match="'tpe' is registered already"):
            register_sampler("tpe")(lambda seed: EvolutionSampler(seed))

    def test_a_sampler_of_ones_own_is_left_as_it_is(self):
        own = optuna.samplers.RandomSampler(3)
        assert as_sampler(own, 0) is own

    def test_the_default_is_known(self):
        assert DEFAULT_SAMPLER in sampler_names()


class TestEvolution:
    def exchanged(self, study):
        """Yield each trial's differences from the best complete trial before it."""
        for trial in study.trials[1:]:
            before = [t for t in study.trials[: trial.number] if t.state == TrialState.COMPLETE]
            best = min(before, key=lambda t: t.value)
            yield {
                name: trial.params[name] - best.params[name]
                for name in trial.params
                if abs(trial.params[name] - best.params[name]) > 1e-9
            }

    def test_children_differ_from_the_best_by_few_exchanges_that_keep_the_sum(self):
        study = run("evolution", 40)
        for changes in self.exchanged(study):
            ratios = {name: change for name, change in changes.items() if name in UNITS}
            assert sum(ratios.values()) == pytest.approx(0, abs=1e-9)
            assert 1 <= len(changes) <= 2 * (3 + 4)
        assert sum(len(changes) <= 2 for changes in self.exchanged(study)) > 12

    def test_priorities_swap_their_values(self):
        for trial in run("evolution", 20).trials:
            assert sorted(trial.params[name] for name in LAYERS) == pytest.approx(
                sorted(START[name] for name in LAYERS)
            )

    def test_levels_stay_on_the_grid_and_in_range(self):
        for trial in run("evolution", 40).trials:
            for name in UNITS:
                steps = (trial.params[name] - 0.4) / 0.05
                assert steps == pytest.approx(round(steps), abs=1e-6)
                assert 0.4 <= trial.params[name] <= 0.6

    def test_equal_wishes_move_apart(self):
        study = optuna.create_study(sampler=EvolutionSampler(0))
        study.enqueue_trial({"kv_wish_a": 0.5, "kv_wish_b": 0.5})

        def wish(trial):
            return trial.suggest_float("kv_wish_a", 0, 1) - trial.suggest_float("kv_wish_b", 0, 1)

        study.optimize(wish, n_trials=6)
        assert study.best_value < 0
        for trial in study.trials:
            assert sum(trial.params.values()) == pytest.approx(1.0)

    def test_nothing_is_tried_twice_while_there_is_more(self):
        study = run("evolution", 60)
        assert len({tuple(t.params.values()) for t in study.trials}) == 60

    def test_it_finds_what_random_draws_do_not(self):
        gap = [run(name, 60, seed=2).best_value for name in ("evolution", "random")]
        assert gap[0] < gap[1]

    def test_without_a_complete_trial_it_draws_at_random(self):
        study = optuna.create_study(sampler=EvolutionSampler(0))
        assert 0.4 <= study.ask().suggest_float("x", **LEVELS) <= 0.6

    def test_of_several_objectives_a_parent_comes_from_the_front(self):
        study = optuna.create_study(
            directions=["minimize", "minimize"], sampler=EvolutionSampler(0)
        )
        study.enqueue_trial(START)
        study.optimize(lambda trial: (draw(trial), trial.params[UNITS[0]]), n_trials=12)
        assert len(study.trials) == 12
