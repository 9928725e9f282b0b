"""Benchmarks from the command line: ours, lm-evaluation-harness, and lmms-eval."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.checkpoint.plugin import apply_config
from hf_adaptive_sparse.cli import main
from hf_adaptive_sparse.compressor import tasks as job
from hf_adaptive_sparse.compressor.model_source import ModelSource
from hf_adaptive_sparse.evaluation.tasks import run
from hf_adaptive_sparse.evaluation.tasks.task import Setting
from tests.processors import make_tokenizer

HARNESS_TASK = """\
task: local_choices
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""

LMMS_TASK = """\
task: local_questions
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: generate_until
doc_to_visual: !function functions.pictures
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 3
process_results: !function functions.score
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
"""

LMMS_FUNCTIONS = """\
from pathlib import Path

from PIL import Image


def pictures(row):
    return [Image.open(Path({folder!r}, row["image"])).convert("RGB")]


def score(row, answers):
    return {{"exact": float(answers[0].strip() == row["answer"])}}
"""


def test_tasks_resume_and_write_results(
    capsys, llava_folder: Path, text_file: Path, question_file: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in question_file.read_text().splitlines()]
    data = tmp_path / "vqa.jsonl"
    data.write_text("\n".join(json.dumps({**row, "answers": [row["answer"]]}) for row in rows))
    arguments = [
        "evaluate", str(llava_folder), "--tasks", "vqav2, wikitext2,vqav2",
        "--task-data", f"vqav2={data}", "--task-data", f"wikitext2={text_file}",
        "--task-samples", "3", "--sequence-length", "64",
        "--results", str(tmp_path / "results"), "--no-progress",
    ]  # fmt: skip
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["tasks"]
    assert [(row["task"], row["metric"], row["count"]) for row in found] == [
        ("vqav2", "accuracy", 3),
        ("wikitext2", "perplexity", 3),
    ]
    assert json.loads((tmp_path / "results/results.json").read_text()) == found
    before = (tmp_path / "results/vqav2.jsonl").read_text()
    assert main(arguments) == 0
    assert "wikitext2" in capsys.readouterr().out
    assert (tmp_path / "results/vqav2.jsonl").read_text() == before


def test_the_weights_are_read_once_for_all_tasks(
    llava_folder: Path, text_file: Path, question_file: Path, tmp_path: Path, monkeypatch
) -> None:
    read: list[str] = []
    for module in (job, run):
        monkeypatch.setattr(module, "weights_digest", lambda model: read.append("") or "digest")
    settings = {"setting": Setting(sequence_length=64), "num_samples": 1, "progress": False}
    data = {"vqav2": str(question_file), "wikitext2": str(text_file)}
    rows = [json.loads(line) for line in question_file.read_text().splitlines()]
    lines = [json.dumps({**row, "answers": [row["answer"]]}) for row in rows]
    question_file.write_text("\n".join(lines))
    for results, count in ((None, 0), (tmp_path / "results", 1)):
        job.evaluate_tasks(
            ModelSource(llava_folder), list(data), data=data, results=results, **settings
        )
        assert len(read) == count


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--tasks", "gqa"], "one of scienceqa, textvqa, vqav2, wikitext2; got 'gqa'"),
        (["--tasks", "vqav2", "--task-data", "x"], "must be TASK=DATA"),
        (["--tasks", "vqav2", "--task-data", "textvqa=x"], "got some for 'textvqa'"),
        (["--task-samples", "3"], "--task-samples needs --tasks"),
        (["--task-batch-size", "3"], "--task-batch-size needs --tasks"),
        (["--tasks", "vqav2", "--questions", "missing.jsonl"], "--questions is not for --tasks"),
        (["--tasks", "vqav2", "--evaluation", "missing.txt"], "--evaluation is not for --tasks"),
        (["--tasks", "vqav2", "--batch-size", "4"], "--batch-size is not for --tasks"),
    ],
)
def test_bad_usage(capsys, extra: list[str], message: str) -> None:
    assert main(["evaluate", "nowhere", *extra]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_lm_evaluation_harness_reads_our_checkpoints(tiny_llama, tmp_path: Path) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-evaluation-harness (lm_eval) is not installed")
    folder = tmp_path / "half"
    apply_config(tiny_llama, SparsityConfig(metric="magnitude", kv_cache=8), progress=False)
    tiny_llama.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    data = tmp_path / "choices.jsonl"
    rows = [{"question": f"{i} is", "choices": ["odd", "even"], "answer": i % 2} for i in range(4)]
    data.write_text("\n".join(map(json.dumps, rows)))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "local_choices.yaml").write_text(HARNESS_TASK.format(data=data))
    _run_program(
        tmp_path, "lm_eval", "run", "--model", "hf",
        "--model_args", f"pretrained={folder},dtype=float32", "--tasks", "local_choices",
        "--include_path", str(tasks), "--device", "cpu", "--output_path", str(tmp_path / "out"),
    )  # fmt: skip
    results = next((tmp_path / "out").rglob("results_*.json"))
    found = json.loads(results.read_text())["results"]["local_choices"]
    assert 0.0 <= found["acc,none"] <= 1.0


@pytest.mark.slow
def test_lmms_eval_reads_our_checkpoints(
    tiny_llava, llava_folder: Path, question_file: Path, tmp_path: Path
) -> None:
    for module in ("lmms_eval", "decord"):  # which its LLaVA models import
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"lmms-eval or a module that it needs ({module}) is not installed")
    apply_config(tiny_llava, SparsityConfig(metric="magnitude", kv_cache=8), progress=False)
    tiny_llava.save_pretrained(llava_folder)  # beside its processor
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "local_questions.yaml").write_text(LMMS_TASK.format(data=question_file))
    (tasks / "functions.py").write_text(LMMS_FUNCTIONS.format(folder=str(tmp_path)))
    model = f"pretrained={llava_folder},dtype=float32,device_map=cpu"
    _run_program(
        tmp_path, "lmms_eval", "eval", "--model", "llava_hf", "--force_simple", "--model_args",
        model + ",chat_template={{ messages[0]['content'] }}", "--tasks", "local_questions",
        "--include_path", str(tasks), "--device", "cpu", "--output_path", str(tmp_path / "out"),
    )  # fmt: skip
    results = next((tmp_path / "out").rglob("*results.json"))
    found = json.loads(results.read_text())["results"]["local_questions"]
    assert 0.0 <= found["exact,none"] <= 1.0


def _run_program(tmp_path: Path, module: str, *arguments: str) -> None:
    """Run another program that knows nothing of the package, and see that it loads all weights."""
    # As installed, torch calls the hook; here the package may be on the path only.
    start = (
        "import hf_adaptive_sparse_autoload as hook; hook.install()\n"
        f"import runpy, sys; sys.argv[0] = '{module}'\n"
        f"runpy.run_module('{module}', None, '__main__')"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", start, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert "newly initialized" not in done.stdout + done.stderr
