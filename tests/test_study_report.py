"""The report of a study: what it reads, what it works out, and the page."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import sqlite3
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch

from hf_adaptive_sparse.cli import main
from hf_adaptive_sparse.report.study_analysis import (
    failure_signs,
    front,
    importance,
    measured_effects,
    sensitivity,
    stopping,
)
from hf_adaptive_sparse.report.study_costs import costs
from hf_adaptive_sparse.report.study_facts import read_study
from hf_adaptive_sparse.report.study_mark import check_report_folder
from hf_adaptive_sparse.report.study_page import write_study_report
from hf_adaptive_sparse.search.errors import SearchError, StorageError
from hf_adaptive_sparse.search.narrowing_result import Narrowing
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.study import search
from hf_adaptive_sparse.staging import OutputError, partial_of
from tests.report_rows import facts, linear_rows, row

HELD_OUT = {
    "trial": 3,
    "windows": 12,
    "tokens": 3000,
    "uniform_perplexity": 100.0,
    "best_perplexity": 98.0,
    "change_percent": -2.0,
    "low_percent": -3.0,
    "high_percent": -1.0,
    "confidence": 0.95,
}


class Page(HTMLParser):
    """Collects what a page shows, and every address in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[str] = []
        self.addresses: list[str] = []
        self.shown: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "href"):
                (self.images if tag == "img" else self.addresses).append(value)
        assert tag not in ("script", "link")

    def handle_data(self, data):
        self.shown.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.shown).split())


def page_of(study, folder) -> Page:
    return Page(write_study_report(study, folder).read_text(encoding="utf-8"))


class TestPage:
    def test_it_is_whole_and_asks_for_nothing_else(self, tmp_path):
        study = facts(linear_rows(40, stopped=12), held_out=HELD_OUT)
        page = page_of(study, tmp_path)
        plots = {"history", "profile", "sensitivity", "importance"}
        assert {path.stem for path in tmp_path.glob("*.png")} == plots
        assert len(page.images) == len(plots)
        assert all(image.startswith("data:image/png;base64,") for image in page.images)
        assert page.addresses == []
        assert "http" not in (tmp_path / "report.html").read_text().replace("data:image", "")
        for said in (
            "Of 40 trials, 12 ended early",
            "28 ran in full",
            "15 % saved",
            "-2.00 %, 95 % interval -3.00 to -1.00 %",
            "paired bootstrap over 12 windows",
            "all take the same bytes",
            "5 min",
            "study <1>",
        ):
            assert said in page.text.replace(" ,", ","), said

    def test_a_report_replaces_a_former_one(self, tmp_path):
        page_of(facts(linear_rows(12)), tmp_path)
        assert "13 trials in the study" in page_of(facts(linear_rows(13)), tmp_path).text
        assert not list(tmp_path.glob("*.partial"))

    def test_a_study_of_failed_trials_alone_has_a_page(self, tmp_path):
        page = page_of(facts([row(0, failure="NaN", state="fail")], profile=None), tmp_path)
        assert page.images == []
        assert "No trial was evaluated in full" in page.text

    def test_a_study_without_trials_has_none(self, tmp_path):
        with pytest.raises(ValueError, match="no finished trial yet"):
            write_study_report(facts([row(0, state="running")]), tmp_path)

    def test_a_baseline_of_0_is_compared_with_in_no_percent(self, tmp_path):
        rows = [row(n, 0.05 * (n == 3), uniform=n == 0, key_bits=[4] * 6) for n in range(15)]
        study = facts(rows, labels=("questions missed",))
        assert "best questions missed, trial 0" in page_of(study, tmp_path).text
        assert failure_signs(study) == ["The search found nothing better than the uniform profile."]

    def test_a_page_that_cannot_be_made_leaves_no_folder(self, tmp_path):
        broken = facts([row(0, 1.0, uniform=True)], space={"kv_bits": 8, "fit_bytes": "much"})
        with pytest.raises(TypeError):
            write_study_report(broken, tmp_path / "report")
        assert not (tmp_path / "report").exists()

    def test_one_width_for_all_layers_is_shown_for_each(self, tmp_path):
        names = [f"model.layers.{layer}.mlp.up_proj" for layer in (0, 2)]
        sparsity = dict.fromkeys(names, 0.5)
        for cache in ({"bits": 8}, {"key_bits": 8, "value_bits": 8}):
            profile = {"format_version": 1, "sparsity": sparsity, "kv_cache": cache}
            text = page_of(facts(linear_rows(3), profile=profile), tmp_path).text
            assert "0 50.00 % 8 8 1 – 8 8 2 50.00 % 8 8" in text

    @pytest.mark.parametrize(("target", "masks"), [(0.5, True), ("free", True), (0.0, False)])
    def test_masks_are_told_of_where_weights_go(self, tmp_path, target, masks):
        narrowing = Narrowing(3, 9, (), None, False, 0.0, 0, "", failure="Out of memory.")
        space = {"target_sparsity": target, "kv_bits": [6, 8]}
        study = facts(linear_rows(5), space=space, held_out=HELD_OUT, narrowing=narrowing)
        text = page_of(study, tmp_path).text
        assert text.count("with the one-shot masks of the search") == 2 * masks
        assert "9 windows of the evaluation data" in text

    def test_sizes_that_vary_give_a_front(self, tmp_path):
        rows = [row(n, 10.0 + (n - 3) ** 2, mean_kv_bits=4.0 + n, uniform=n == 0) for n in range(6)]
        page = page_of(facts(rows), tmp_path)
        assert (tmp_path / "pareto.png").is_file()
        assert "all take the same bytes" not in page.text

    def test_a_budget_in_bytes_leaves_the_ratio_free(self, tmp_path):
        names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(6)]
        rows = linear_rows(20)
        study = facts(
            rows,
            space={"target_sparsity": "free", "fit_bytes": 3 * 10**9, "weight_bits": [4, 16]},
            profile={
                "format_version": 1,
                "sparsity": dict.fromkeys(names, 0.3),
                "weight_bits": dict.fromkeys(names[:3], 4) | dict.fromkeys(names[3:], 16),
            },
        )
        assert study.target is None
        text = page_of(study, tmp_path).text
        assert "at most 3.00 GB in memory" in text
        assert "weight bits from 4, 16" in text
        assert "0 30.00 % 4 1 30.00 % 4" in text

    def test_two_objectives_give_a_front_of_them(self, tmp_path):
        rows = [row(n, 10.0 - n, values=[10.0 - n, 1e6 * n], uniform=n == 0) for n in range(5)]
        study = facts(rows, labels=("kl", "bytes"))
        assert costs(study).label == "bytes"
        assert costs(study).points[2] == (2e6, 8.0)
        page = page_of(study, tmp_path)
        assert (tmp_path / "pareto.png").is_file()
        assert "best kl, trial 4" in page.text

    def test_what_was_measured_before_the_search_is_shown(self, tmp_path):
        measured = {
            "labels": ["block_0", "block_1"],
            "low": 0.45,
            "high": 0.55,
            "target": 0.5,
            "at_low": [-0.001, -0.002],
            "at_high": [0.004, 0.001],
        }
        study = facts(linear_rows(5), measured=measured)
        assert [(e.label, round(e.percent, 9)) for e in measured_effects(study)] == [
            ("block 0", 0.8),
            ("block 1", 0.2),
        ]
        assert "Measured before the search" in page_of(study, tmp_path).text
        assert (tmp_path / "measured_sensitivity.png").is_file()

    def test_nothing_was_measured_where_a_group_stayed_at_the_target(self, tmp_path):
        measured = {"labels": ["block_0"], "high": 0.5, "target": 0.5, "at_high": [0.0]}
        study = facts(linear_rows(5), measured=measured)
        assert measured_effects(study) == []
        assert "Measured before the search" not in page_of(study, tmp_path).text


class TestAnalysis:
    def test_sensitivity_finds_the_group_that_matters(self):
        effects = sensitivity(facts(linear_rows(60)))
        assert [e.label for e in effects] == ["layers 0–1", "layer 2", "layer 3", "layers 4–5"]
        # Relative to the mean of the four, as the ratios add up to a constant.
        assert [e.percent for e in effects] == pytest.approx([-0.5, 1.5, -0.5, -0.5], abs=0.02)
        assert max(e.error for e in effects) < 0.05

    def test_importance_finds_it_too(self):
        shares = importance(facts(linear_rows(60)))
        assert shares[0][0] == "sparsity, layer 2"
        assert sum(share for _, share in shares) == pytest.approx(1)

    def test_bits_that_keys_and_values_share_are_one_choice(self):
        rows = linear_rows(30)
        for one in rows:
            bits = [8, 6] if one["number"] % 2 else [6, 8]
            one |= {"key_bits": bits, "value_bits": bits}
        names = [name for name, _ in importance(facts(rows))]
        assert {"KV bits, layer 0", "KV bits, layer 1"} < set(names)

    def test_weight_bits_that_a_block_shares_are_one_choice(self):
        rows = linear_rows(30)
        for one in rows:
            first, second = (8, 4) if one["number"] % 2 else (4, 8)
            one |= {"weight_bits": [first, first, None, second, 16, 16]}
        names = [name for name, _ in importance(facts(rows))]
        assert sorted(name for name in names if name.startswith("weight bits")) == [
            "weight bits, layer 3",
            "weight bits, layers 0–1",
        ]

    def test_few_trials_tell_nothing(self):
        study = facts(linear_rows(6))
        assert sensitivity(study) == []
        assert importance(study) == []

    def test_a_value_of_0_has_no_logarithm_to_fit(self):
        rows = linear_rows(60)
        rows[7]["value"] = 0.0  # no question missed
        assert sensitivity(facts(rows)) == []

    def test_optunas_verbosity_is_left_alone(self):
        before = optuna.logging.get_verbosity()
        importance(facts(linear_rows(30)))
        assert optuna.logging.get_verbosity() == before

    def test_repeated_and_withdrawn_trials_do_not_enter(self):
        rows = linear_rows(20)
        rows += [row(20, 1.0, duplicate_of=3), row(21, state="fail", withdrawn=True)]
        study = facts(rows)
        assert len(study.evaluated) == 20
        assert study.best["number"] != 20

    def test_stopping_counts_batches(self):
        saved = stopping(facts(linear_rows(40, stopped=12)))
        assert saved == {
            "stopped": 12,
            "kept": 28,
            "batches": 12 * 4 + 28 * 8,
            "of_batches": 320,
            "saved_percent": pytest.approx(15.0),
        }
        assert stopping(facts(linear_rows(5))) is None

    def test_the_front_keeps_what_nothing_beats(self):
        points = [(1, 9.0), (2, 5.0), (2, 6.0), (3, 5.0), (4, 1.0), (0, 9.0)]
        assert front(points) == [5, 1, 4]

    def test_equal_costs_are_no_trade_off(self):
        assert costs(facts(linear_rows(5))) is None
        rows = [row(0, 3.0, bytes={"size_bytes": 2e6}), row(1, 4.0, bytes={"size_bytes": 1e6})]
        cost = costs(facts(rows))
        assert cost.points == ((2.0, 3.0), (1.0, 4.0))
        assert cost.label == "size on disk (MB)"


class TestFailureSigns:
    def signs(self, rows, **changes):
        return " ".join(failure_signs(facts(rows, **changes)))

    def test_a_sound_study_has_none(self):
        assert failure_signs(facts(linear_rows(30), held_out=HELD_OUT)) == []

    def test_uniform_is_best(self):
        assert "nothing better than the uniform" in self.signs([row(0, 1.0, uniform=True)])

    def test_the_best_has_collapsed_to_uniform(self):
        rows = [row(0, 2.0, uniform=True), row(1, 1.0, block_ratios=[0.51, 0.49, 0.5, 0.5])]
        assert "collapsed to uniform" in self.signs(rows)
        rows[1]["block_ratios"] = [0.52, 0.48, 0.5, 0.5]
        assert "collapsed" not in self.signs(rows)

    def test_low_bits_lose_the_quality(self):
        rows = linear_rows(20)
        rows += [row(20 + n, 190.0, key_bits=[2] + [8] * 5) for n in range(3)]
        assert "with 2 bits in the narrowest layer, 3 of 23 trials" in self.signs(rows)

    @pytest.mark.parametrize(
        ("failure", "said"),
        [
            ("The perplexity is inf.", "1 of 21 trials had scores that are not finite"),
            ("The loss must be finite; batch 3 gives nan", "not finite"),
            ("Out of memory: 3 GB", "1 of 21 trials ran out of memory"),
            ("Its worker was stopped.", "failed for other reasons"),
        ],
    )
    def test_failures_are_counted_by_kind(self, failure, said):
        assert said in self.signs([*linear_rows(20), row(20, state="fail", failure=failure)])

    def test_no_baseline(self):
        assert "no baseline" in self.signs(linear_rows(20)[1:])

    @pytest.mark.parametrize(
        ("low", "high", "said"), [(-1.0, 0.5, "cannot be told"), (0.1, 0.9, "is worse")]
    )
    def test_held_out_data_contradict(self, low, high, said):
        held = HELD_OUT | {"low_percent": low, "high_percent": high}
        assert said in self.signs(linear_rows(20), held_out=held)


@pytest.fixture
def study_folder(tiny_llama, text_batches, tmp_path):
    result = search(
        tiny_llama,
        text_batches[:2],
        text_batches[2:3],
        SearchSpace(blocks=4, kv_bits=None),
        held_out=text_batches[3:],
        n_trials=4,
        storage=tmp_path / "search.journal",
        progress=False,
    )
    result.save(tmp_path)
    return tmp_path


class TestReading:
    def test_a_folder_its_journal_and_its_json_say_the_same(self, study_folder):
        from_folder = read_study(study_folder)
        assert read_study(study_folder / "search.journal") == from_folder
        (study_folder / "search.journal").unlink()
        from_json = read_study(study_folder)
        for field in ("name", "space", "metric", "spans", "rows", "profile", "held_out"):
            assert getattr(from_json, field) == getattr(from_folder, field), field
        assert from_folder.workers == 1
        assert from_folder.held_out["windows"] == 2

    def test_questions_missed_are_called_so(self, study_folder):
        (study_folder / "search.journal").unlink()
        path = study_folder / "search.json"
        for objective, labels in (
            ("accuracy", ("questions missed",)),
            ({"accuracy": 2, "kl": 1}, ("2 questions missed + 1 kl",)),
            (["accuracy", "bytes"], ("questions missed", "bytes")),
            ("another", ("another",)),
        ):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"objective": objective}))
            assert read_study(study_folder).labels == labels

    def test_the_command_writes_the_page(self, study_folder, capsys):
        out = study_folder / "report"
        assert main(["report", str(study_folder), "--output", str(out), "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["page"] == str(out / "report.html")
        assert answer["trials"] == 4
        assert math.isfinite(answer["best_value"])
        assert re.search(r"paired bootstrap over 2 windows", (out / "report.html").read_text())

    def test_the_command_replaces_only_a_report_of_the_same_study(
        self, study_folder, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.chdir(tmp_path)
        command = ["report", str(study_folder)]
        assert main(command) == main(command) == 0
        assert main(["report", str(study_folder / "search.journal")]) == 0
        written = write_study_report(facts(linear_rows(12)), "report").read_text(encoding="utf-8")
        assert main(command) == 2
        assert "report holds the report of another study. Choose" in capsys.readouterr().err
        assert Path("report/report.html").read_text(encoding="utf-8") == written
        assert main([*command, "--overwrite"]) == main(command) == 0

    def test_the_command_writes_into_no_folder_of_something_else(self, study_folder, capsys):
        command = ["report", str(study_folder), "--output", str(study_folder)]
        assert main(command) == 2
        assert "holds something else. Choose another folder with --output" in (
            capsys.readouterr().err
        )
        assert not (study_folder / "report.html").exists()
        assert main([*command, "--overwrite"]) == 0
        assert (study_folder / "search.json").is_file()

    def test_a_study_is_the_same_as_its_trials_come_in(self, tmp_path):
        first, *others = linear_rows(12)
        other = dict(first, value=first["value"] + 1)
        begun = facts([dict(first, uniform=False)])
        write_study_report(begun, tmp_path)
        for rows in ([first], [first, *others]):
            check_report_folder(facts(rows), tmp_path)
            write_study_report(facts(rows), tmp_path)
        check_report_folder(begun, tmp_path)
        for study in (facts([other]), facts([first], name="other"), facts([first], metric="ria")):
            with pytest.raises(OutputError, match="another study"):
                check_report_folder(study, tmp_path)
        (tmp_path / "report.html").write_text("<html></html>")
        with pytest.raises(OutputError, match="a page that names no study"):
            check_report_folder(begun, tmp_path)

    @pytest.mark.parametrize("name", ["missing", "missing.journal", "missing.db"])
    def test_what_is_not_there_is_not_made(self, tmp_path, name):
        with pytest.raises(StorageError, match="there is no file or folder"):
            read_study(tmp_path / name)
        assert not (tmp_path / name).exists()

    def test_a_search_that_runs_is_found_by_the_folder_it_is_to_write(self, study_folder, tmp_path):
        output = tmp_path / "out"
        partial_of(output).mkdir()
        shutil.copy(study_folder / "search.journal", partial_of(output))
        assert read_study(output).rows == read_study(study_folder).rows
        output.mkdir()
        assert len(read_study(output).rows) == 4
        (output / "other").touch()  # another result is not passed over
        with pytest.raises(StorageError, match=r"neither search\.journal nor search\.json"):
            read_study(output)

    @pytest.mark.parametrize("text", ["Loading\nand no end", '{"a": 1}', "[1]\n", "\n"])
    def test_a_file_that_is_no_journal_stays_as_it_is(self, tmp_path, text):
        (tmp_path / "run.log").write_text(text)
        with pytest.raises(StorageError, match=r"run\.log is no journal of a search"):
            read_study(tmp_path / "run.log")
        assert (tmp_path / "run.log").read_text() == text
        assert [path.name for path in tmp_path.iterdir()] == ["run.log"]

    def test_a_database_of_something_else_stays_as_it_is(self, tmp_path):
        with contextlib.closing(sqlite3.connect(tmp_path / "mine.db")) as mine:
            mine.execute("CREATE TABLE notes (text)")
        before = (tmp_path / "mine.db").read_bytes()
        with pytest.raises(StorageError, match=r"mine\.db cannot be used: .*no such table"):
            read_study(tmp_path / "mine.db")
        assert (tmp_path / "mine.db").read_bytes() == before

    def test_an_address_of_no_file_makes_none(self, tmp_path):
        with pytest.raises(StorageError, match=r"there is no file .*none\.db"):
            read_study(f"sqlite:///{tmp_path / 'none.db'}")
        assert not list(tmp_path.iterdir())
        with pytest.raises(StorageError, match="neither"):
            read_study("/")

    def test_a_damaged_journal_is_named(self, study_folder):
        journal = study_folder / "search.journal"
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join([*lines[:3], b"{\n", *lines[3:]]))
        with pytest.raises(StorageError, match=r"search\.journal is damaged: a record"):
            read_study(journal)

    def test_reading_mends_nothing(self, study_folder):
        journal = study_folder / "search.journal"
        whole = read_study(journal)
        journal.write_bytes(journal.read_bytes() + b'{"op_code":')
        torn = journal.read_bytes()
        assert read_study(journal).rows == whole.rows
        assert journal.read_bytes() == torn

    def test_an_empty_folder_says_what_is_expected(self, tmp_path):
        with pytest.raises(StorageError, match=r"neither search\.journal nor search\.json"):
            read_study(tmp_path)

    def test_one_of_several_studies_has_to_be_named(self, study_folder):
        journal = study_folder / "search.journal"
        with pytest.raises(SearchError, match=r"No study 'x'; the storage holds: 'hf-adaptive"):
            read_study(journal, "x")
        storage = optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(journal))
        )
        optuna.create_study(storage=storage, study_name="other")
        with pytest.raises(SearchError, match="Name one of its studies with --study"):
            read_study(journal)
        with pytest.raises(SearchError, match="was not made by hf_adaptive_sparse"):
            read_study(journal, "other")
        # A folder says itself which of them its result is of.
        assert read_study(study_folder).name == "hf-adaptive-sparse"

    def test_another_name_than_the_folders_is_refused(self, study_folder):
        (study_folder / "search.journal").unlink()
        with pytest.raises(SearchError, match="not 'x'"):
            read_study(study_folder, "x")


def test_optuna_dashboard_shows_the_study(study_folder):
    dashboard = pytest.importorskip("optuna_dashboard", reason="optuna-dashboard is not installed")
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(study_folder / "search.journal"))
    )
    app = dashboard.wsgi(storage)

    def get(path: str):
        status = []
        environ = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": path,
            "QUERY_STRING": "",
            "SERVER_NAME": "test",
            "SERVER_PORT": "80",
            "wsgi.url_scheme": "http",
        }
        body = b"".join(app(environ, lambda code, headers, *_: status.append(code)))
        assert status[0].startswith("200"), (path, status)
        return json.loads(body)

    (summary,) = get("/api/studies")["study_summaries"]
    assert summary["study_name"] == "hf-adaptive-sparse"
    detail = get(f"/api/studies/{summary['study_id']}")
    assert len(detail["trials"]) == 4
    keys = {attribute["key"] for attribute in detail["trials"][0]["user_attrs"]}
    assert {"profile", "mean_sparsity", "seconds"} <= keys


class TestHeldOut:
    def test_the_interval_follows_from_paired_windows(self):
        from hf_adaptive_sparse.search.comparison import compare

        uniform = [(40.0 + n, 10) for n in range(30)]
        best = [(loss - 0.2, count) for loss, count in uniform]
        same = compare(7, uniform, best)
        assert same.trial == 7
        assert same.change_percent == pytest.approx(100 * math.expm1(-0.02))
        assert same.low_percent == pytest.approx(same.change_percent)
        assert same.high_percent == pytest.approx(same.change_percent)
        noisy = [(loss - 0.2 + (-1) ** n, 10) for n, (loss, _) in enumerate(uniform)]
        wide = compare(7, uniform, noisy)
        assert wide.low_percent < wide.change_percent < wide.high_percent
        assert wide.change_percent == pytest.approx(same.change_percent)
        assert compare(7, uniform, noisy) == wide

    @pytest.mark.parametrize("windows", [2, 3, 6, 20])
    def test_the_interval_holds_as_often_as_it_says_for_few_windows_too(self, windows, monkeypatch):
        from hf_adaptive_sparse.search import comparison

        monkeypatch.setattr(comparison, "RESAMPLES", 1000)
        generator = np.random.default_rng(0)
        held = 0
        for seed in range(300):
            tokens = generator.integers(80, 160, size=windows).tolist()
            gains = generator.normal(0.02, 0.05, size=windows)
            uniform = [(4.0 * count, count) for count in tokens]
            best = [(4.0 * n - gain * n, n) for n, gain in zip(tokens, gains, strict=True)]
            found = comparison.compare(1, uniform, best, seed)
            held += found.low_percent <= 100 * math.expm1(-0.02) <= found.high_percent
        assert 0.92 <= held / 300 <= 0.98

    def test_an_interval_beyond_all_floats_ends_at_one(self):
        from hf_adaptive_sparse.search.comparison import compare

        found = compare(1, [(1.0, 1), (1.0, 1)], [(9.0, 1), (500.0, 1)])
        assert math.isfinite(found.high_percent)

    def test_resamples_are_the_same_however_many_are_held(self, monkeypatch):
        from hf_adaptive_sparse.search import comparison

        generator = np.random.default_rng(1)
        tokens = generator.integers(0, 3, size=7)
        gain = generator.normal(size=7) * (tokens > 0)
        draws = np.random.default_rng(5).integers(7, size=(comparison.RESAMPLES, 7))
        counts = tokens[draws].sum(1)
        expected = gain[draws].sum(1)[counts > 0] / counts[counts > 0]
        monkeypatch.setattr(comparison, "DRAWS_HELD", 1000)
        means = comparison._resampled_means(gain, tokens, 5)
        np.testing.assert_array_equal(means, expected)
        tracemalloc.start()
        comparison._resampled_means(np.ones(500), np.ones(500, dtype=int), 5)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < comparison.RESAMPLES * 500

    def test_windows_that_differ_are_refused(self):
        from hf_adaptive_sparse.search.comparison import compare

        with pytest.raises(ValueError, match="the same windows"):
            compare(0, [(1.0, 2)], [(1.0, 3)])
        with pytest.raises(ValueError, match="not finite"):
            compare(0, [(1.0, 2)], [(math.nan, 2)])
        with pytest.raises(ValueError, match="No token"):
            compare(0, [(0.0, 0)], [(0.0, 0)])
        with pytest.raises(ValueError, match="two windows"):
            compare(0, [(1.0, 2), (0.0, 0)], [(1.5, 2), (0.0, 0)])

    def test_a_profile_that_cannot_be_drawn_is_no_failed_comparison(self):
        from hf_adaptive_sparse.search.comparison import compare_on

        def fail(*arguments):
            raise ValueError("no such choice")

        study = optuna.create_study()
        study.add_trial(optuna.create_trial(value=1.0, user_attrs={"profile_digest": "0"}))
        with pytest.raises(ValueError, match="no such choice"):
            compare_on(study, None, None, None, [], draw=fail)

    def test_text_is_cut_into_its_rows_and_images_are_not(self):
        from hf_adaptive_sparse.search.comparison import windows_of

        text = {"input_ids": torch.arange(6).reshape(3, 2)}
        images = {"input_ids": torch.ones(2, 4), "pixel_values": torch.ones(2, 3, 4, 4)}
        windows = windows_of([text, images])
        assert [w["input_ids"].shape[0] for w in windows] == [1, 1, 1, 2]
        assert torch.equal(windows[1]["input_ids"], text["input_ids"][1:2])

    def test_a_search_that_is_finished_gets_its_comparison_later(
        self, tiny_llama, text_batches, tmp_path
    ):
        def run(**more):
            return search(
                tiny_llama,
                text_batches[:1],
                text_batches[1:2],
                SearchSpace(blocks=2, kv_bits=None),
                n_trials=3,
                storage=tmp_path / "s.journal",
                progress=False,
                **more,
            )

        assert run().to_dict()["held_out"] is None
        first = run(held_out=text_batches[2:]).to_dict()["held_out"]
        assert first["windows"] == 4
        assert len(run().history) == 3
        assert run().to_dict()["held_out"] == first
