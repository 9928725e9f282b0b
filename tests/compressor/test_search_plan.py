"""What a search loads before it begins."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from optuna import create_study

from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.compressor.data_source import DataSource
from hf_adaptive_sparse.compressor.jobs import search_study
from hf_adaptive_sparse.compressor.model_source import ModelSource
from hf_adaptive_sparse.compressor.search_plan import Loaded, SearchPlan
from hf_adaptive_sparse.search.errors import NothingToChoose, StudyMismatch, TrialsFailed
from hf_adaptive_sparse.search.opening import FINGERPRINT
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.storage import open_storage
from hf_adaptive_sparse.search.study import STUDY_NAME

KV_ALONE = SearchSpace(target_sparsity=None)


@pytest.mark.parametrize(
    ("space", "metric", "final", "needed"),
    [
        (SearchSpace(), "lognorm", None, True),
        (SearchSpace(), "magnitude", None, False),
        (SearchSpace(), "sparsegpt", None, True),
        (SearchSpace(), "magnitude", SparsityConfig(metric="magnitude"), False),
        (SearchSpace(), "magnitude", SparsityConfig(metric="magnitude", weight_update="obs"), True),
        (KV_ALONE, "lognorm", None, False),
        (KV_ALONE, "lognorm", SparsityConfig(target_sparsity=0.0), False),
        (KV_ALONE, "lognorm", SparsityConfig(pattern="2:4"), True),
    ],
)
def test_calibration_data_are_needed_where_something_reads_them(space, metric, final, needed):
    plan = SearchPlan(space, "study.journal", metric=metric, final=final)
    assert plan.needs_calibration is needed


def test_data_that_nothing_reads_are_not_loaded(llava_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a fox sees a dog\n" * 60)
    plan = SearchPlan(
        KV_ALONE,
        "study.journal",
        calibration=DataSource(tmp_path / "missing.txt"),
        evaluation=DataSource(text, num_samples=2, sequence_length=16),
    )
    assert plan.load(ModelSource(llava_folder)).calibration is None


@pytest.mark.parametrize(
    ("samples", "batch_size", "rows"),
    [
        (5, 4, [[4, 1], [4, 1]]),
        (1, 2, [[1], [1]]),
        (4, 4, [[4], [4]]),
        (2, 1, [[1, 1], [1, 1]]),
    ],
)
def test_halves_have_the_windows_asked_for_in_batches_of_any_size(
    llava_folder, text_file, samples, batch_size, rows
):
    data = DataSource(text_file, samples, sequence_length=16, batch_size=batch_size)
    loaded = SearchPlan(KV_ALONE, "study.journal", evaluation=data).load(ModelSource(llava_folder))
    halves = [loaded.searched, loaded.held_out]
    assert [[len(batch["input_ids"]) for batch in half] for half in halves] == rows
    one_by_one = replace(data, num_samples=2 * samples, batch_size=1)
    windows = one_by_one.batches(loaded.processor, loaded.model.config, "validation")
    assert torch.equal(
        torch.cat([batch["input_ids"] for half in halves for batch in half]),
        torch.cat([batch["input_ids"] for batch in windows]),
    )


def test_a_bound_is_refused_where_no_data_are_left_to_hold_it_on(llava_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a fox sees a dog\n")  # a single window
    data = DataSource(text, num_samples=1, sequence_length=16, batch_size=2)
    plan = SearchPlan(KV_ALONE, "study.journal", evaluation=data)
    loaded = plan.load(ModelSource(llava_folder))
    assert loaded.held_out is loaded.searched
    with pytest.raises(ValueError, match="a single batch, and the bound needs data that no search"):
        replace(plan, max_loss=0.01).load(ModelSource(llava_folder))


def test_each_kind_of_search_takes_its_own_plans():
    loaded = Loaded(None, None, None, [], [])
    with pytest.raises(ValueError, match=r"max_loss=0\.01 searches the smallest budget"):
        SearchPlan(KV_ALONE, max_loss=0.01).search(loaded)
    with pytest.raises(ValueError, match="max_loss must be set"):
        SearchPlan(KV_ALONE).search_within(loaded)


def test_workers_of_a_study_need_a_storage():
    with pytest.raises(ValueError, match=r"needs a storage .* got storage=None"):
        search_study(ModelSource("no/such/model"), SearchPlan(SearchSpace()), workers=2)


@pytest.mark.parametrize(
    ("folder", "named"), [("out.adaptive-sparse.partial", True), ("mine", False)]
)
def test_a_study_left_by_an_interrupted_job_is_named_where_it_does_not_fit(
    llava_folder, text_file, tmp_path, folder, named
):
    (tmp_path / folder).mkdir()
    journal = tmp_path / folder / "search.journal"
    study = create_study(study_name=STUDY_NAME, storage=open_storage(journal))
    study.set_user_attr(FINGERPRINT, {"metric": "magnitude"})
    data = DataSource(text_file, num_samples=2, sequence_length=16)
    plan = SearchPlan(KV_ALONE, str(journal), evaluation=data)
    with pytest.raises(StudyMismatch, match="cannot be resumed") as refused:
        plan.search(plan.load(ModelSource(llava_folder)), progress=False)
    assert (f"{journal}: delete that file" in str(refused.value)) is named


@pytest.mark.parametrize(
    ("error", "stays"), [(NothingToChoose, False), (TrialsFailed, False), (KeyboardInterrupt, True)]
)
def test_a_journal_stays_only_where_the_search_can_be_resumed(tmp_path, error, stays):
    with pytest.raises(error), SearchPlan(KV_ALONE).kept_in(tmp_path) as kept:
        open_storage(kept.storage)
        assert (tmp_path / "search.journal").exists()
        raise error
    assert (tmp_path / "search.journal").exists() is stays


def test_a_storage_of_the_users_own_is_never_removed(tmp_path):
    storage = tmp_path / "study.journal"
    open_storage(storage)
    plan = SearchPlan(KV_ALONE, str(storage))
    with pytest.raises(TrialsFailed), plan.kept_in(tmp_path):
        raise TrialsFailed
    assert storage.exists()
