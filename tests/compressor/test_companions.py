"""Workers on one machine, and one study for several command lines."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hf_adaptive_sparse.cli import main
from hf_adaptive_sparse.compressor.companions import companions, share_devices
from hf_adaptive_sparse.compressor.model_source import ModelSource
from hf_adaptive_sparse.search.worker import process_start

MODEL = ModelSource("model")


def leave_a_file(model: ModelSource, folder: Path) -> None:
    threads = torch.get_num_threads(), int(os.environ["OMP_NUM_THREADS"])
    (folder / str(os.getpid())).write_text(json.dumps(threads))


def fail(model: ModelSource) -> None:
    raise SystemExit(3)


class Job:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, model: ModelSource) -> None:
        leave_a_file(model, self.folder)


def test_companions_do_the_job_with_their_share_of_the_threads(tmp_path: Path) -> None:
    before, environment = torch.get_num_threads(), dict(os.environ)
    torch.set_num_threads(4)
    try:
        with companions(MODEL, Job(tmp_path), workers=2) as own:
            assert own == MODEL
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert os.environ == environment
    (written,) = tmp_path.iterdir()
    assert written.name != str(os.getpid())
    assert json.loads(written.read_text()) == [2, 2]


def test_a_companion_that_fails_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with companions(MODEL, fail, workers=2):
        pass
    assert "1 of 2 workers failed" in caplog.text


def test_companions_end_with_a_failed_search(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), companions(MODEL, Job(tmp_path), workers=2):
        raise KeyboardInterrupt


class Interrupted:
    """Notes that it runs, is interrupted as by Ctrl-C, and notes that it goes on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, model: ModelSource) -> None:
        leave_a_file(model, self.folder)
        os.kill(os.getpid(), signal.SIGINT)
        (self.folder / "went on").touch()
        time.sleep(60)


def wait_for(path: Path, pattern: str) -> str:
    """Return the name of the first file that fits, once there is one."""
    deadline = time.monotonic() + 60
    while not (found := sorted(path.glob(pattern))):
        assert time.monotonic() < deadline, f"no {pattern} in {path}"
        time.sleep(0.05)
    return found[0].name


def test_an_interruption_of_the_terminal_is_left_to_the_first_worker(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        companions(MODEL, Interrupted(tmp_path), workers=2),
    ):
        wait_for(tmp_path, "went on")
        raise KeyboardInterrupt
    assert not is_running(int(wait_for(tmp_path, "[0-9]*")))


def search_on(folder: Path) -> None:
    with companions(MODEL, Interrupted(folder), workers=2):
        time.sleep(60)


def is_running(pid: int) -> bool:
    return process_start(pid) != ""


def test_companions_end_when_their_process_is_killed(tmp_path: Path) -> None:
    first = multiprocessing.get_context("spawn").Process(target=search_on, args=(tmp_path,))
    first.start()
    companion = int(wait_for(tmp_path, "[0-9]*"))
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    deadline = time.monotonic() + 20
    while is_running(companion) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(companion)


def test_a_job_that_cannot_be_sent_to_a_process_is_the_error_that_is_raised() -> None:
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        companions(MODEL, lambda model: None, workers=3).__enter__()


def test_workers_must_be_at_least_one() -> None:
    with pytest.raises(ValueError, match="workers must be a whole number >= 1, got 0"):
        companions(MODEL, fail, workers=0).__enter__()


def test_a_script_that_starts_itself_again_is_told_how_not_to(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from hf_adaptive_sparse.compressor import ModelSource, compress\n"
        "from hf_adaptive_sparse.compressor.companions import companions\n"
        "if __name__ == '__main__':\n"
        "    with companions(ModelSource('model'), print, workers=2):\n"
        "        pass\n"
        "else:\n"
        "    compress('model', 'output', workers=2)\n"
    )
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "Put what the script does below `if __name__ == '__main__':`." in done.stderr
    assert "1 of 2 workers failed" in done.stderr


@pytest.mark.parametrize(
    ("workers", "gpus", "device_map", "expected"),
    [
        (1, 2, None, [None]),
        (2, 0, None, [None, None]),
        (3, 2, None, ["cuda:0", "cuda:1", "cuda:0"]),
        (2, 2, "balanced", ["balanced", "balanced"]),
    ],
)
def test_each_worker_takes_a_gpu_in_turn(workers, gpus, device_map, expected) -> None:
    shared = share_devices(ModelSource("model", device_map=device_map), workers, gpus)
    assert [model.device_map for model in shared] == expected


@pytest.mark.parametrize(
    ("asked", "cuda", "used"), [(None, False, None), (None, True, "auto"), ("cpu", True, "cpu")]
)
def test_a_model_goes_to_the_visible_gpus(llava_folder, monkeypatch, asked, cuda, used) -> None:
    seen = []
    from transformers import AutoModelForImageTextToText

    original = AutoModelForImageTextToText.from_pretrained

    def recording(*arguments, device_map, **options):
        seen.append(device_map)
        return original(*arguments, **options)

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", recording)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    ModelSource(llava_folder, device_map=asked).load()
    assert seen == [used]


def test_command_lines_share_a_study(
    capsys, llava_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    data = ["--calibration", text_file, "--evaluation", text_file, "--sequence-length", 32]
    size = ["--calibration-samples", 4, "--evaluation-samples", 4, "--no-progress", "--json"]
    study = ["--storage", tmp_path / "study.journal", "--study", "mine"]

    def search(*more: object) -> dict:
        command = ["search", llava_folder, *data, *size, *study, *more]
        assert main([str(part) for part in command]) == 0
        return json.loads(capsys.readouterr().out)

    first = search("--trials", 2)
    second = search("--trials", 4, "--workers", 2, "--output", tmp_path / "found")
    assert second["study_name"] == "mine"
    assert second["history"][:2] == first["history"]
    tried = [row for row in second["history"] if row["state"] in ("complete", "pruned")]
    assert len(tried) == 4
    assert (tmp_path / "found/profile.json").is_file()

    code = main([str(part) for part in ["search", llava_folder, *data, "--trials", 2]])
    assert code == 2
    assert "Give --output DIR, or --storage" in capsys.readouterr().err
