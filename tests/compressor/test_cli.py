"""The command line: exit codes, one clear line per error, JSON on stdout."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel
from transformers.utils.logging import is_progress_bar_enabled

from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.cli import main
from hf_adaptive_sparse.cli.arguments import build_parser
from hf_adaptive_sparse.cli.space_arguments import space_of, widths
from hf_adaptive_sparse.compressor import ModelSource, checks, pipeline, prune_to_folder
from hf_adaptive_sparse.compressor.presets import get_preset
from hf_adaptive_sparse.hub import HubError
from hf_adaptive_sparse.kernels import triton_device
from hf_adaptive_sparse.kernels.library import describe as describe_kernels
from hf_adaptive_sparse.profiles import CompressionProfile, KVCacheConfig
from hf_adaptive_sparse.version import __version__


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def small(text: Path) -> list[object]:
    return ["--calibration", text, "--sequence-length", 32, "--calibration-samples", 8]


def test_compress_inspect_evaluate(
    capsys, llava_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    evaluation = ["--evaluation", text_file, "--evaluation-samples", 4, "--no-progress", "--json"]
    code, stdout, _ = run(
        capsys, "compress", llava_folder, "--output", out, "--trials", 2, *small(text_file),
        *evaluation,
    )  # fmt: skip
    assert code == 0
    result = json.loads(stdout)
    assert result["mean_sparsity"] == pytest.approx(0.5, abs=1e-4)
    assert [row["name"] for row in result["measurements"]] == ["dense", "compressed"]

    code, stdout, _ = run(capsys, "inspect", out, "--json")
    assert code == 0
    assert json.loads(stdout)["target_sparsity"] == 0.5
    code, stdout, _ = run(capsys, "inspect", out)
    assert "KV cache" in stdout

    code, stdout, _ = run(capsys, "evaluate", out, "--sequence-length", 32, *evaluation)
    own = json.loads(stdout)
    assert own["sparsity"] == pytest.approx(0.5, abs=1e-4)
    code, stdout, _ = run(
        capsys, "evaluate", out, "--sequence-length", 32, "--kv-bits", "none", *evaluation
    )
    assert json.loads(stdout)["kv_bytes_per_token"] > own["kv_bytes_per_token"]


def test_a_failed_push_shows_what_was_done_and_how_to_finish_it(
    capsys, monkeypatch, llava_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise HubError("The Hub is closed.")

    monkeypatch.setattr(checks, "push_token", lambda repo_id: "token")
    monkeypatch.setattr(pipeline, "push_folder", refuse)
    out = tmp_path / "out"
    code, stdout, stderr = run(
        capsys, "compress", llava_folder, "--output", out, "--quality", "paper", "--metric",
        "magnitude", "--pattern", "2:4", "--kv-bits", 8, "--evaluation", text_file,
        "--evaluation-samples", 4, "--sequence-length", 32, "--no-progress",
        "--push-to-hub", "me/half", "--private",
    )  # fmt: skip
    assert code == 2
    assert re.search("^compressed .*\n\nSaved to ", stdout, re.MULTILINE)
    last = stderr.splitlines()[-1]
    assert last.startswith("hf-adaptive-sparse compress: The Hub is closed. The model is complete")
    assert f"`hf-adaptive-sparse push {out} me/half --private`" in last
    assert (out / "model.safetensors").is_file()


@pytest.mark.parametrize("repo", ["me/half", "me/too/many"])
def test_a_push_that_cannot_be_is_refused_before_the_work(
    capsys, monkeypatch, tmp_path: Path, repo: str
) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    code, _, stderr = run(
        capsys, "compress", tmp_path / "unread", "--output", tmp_path / "out", "--push-to-hub", repo
    )
    assert code == 2
    assert ("needs a token" if repo == "me/half" else "A repo id must be") in stderr


def test_no_progress_hides_the_bars_of_transformers_for_one_command(
    capsys, llava_folder: Path, tmp_path: Path
) -> None:
    capsys.readouterr()  # what saving the model showed
    arguments = ["prune", llava_folder, "--metric", "magnitude", "--output"]
    for name, hidden in (("hidden", ["--no-progress"]), ("shown", [])):
        code, _, stderr = run(capsys, *arguments, tmp_path / name, *hidden)
        assert code == 0
        assert ("Loading weights" in stderr) == ("Writing model shards" in stderr) == (not hidden)
    run(capsys, "prune", "--no-progress", "--output", tmp_path / "fails", tmp_path / "absent")
    assert is_progress_bar_enabled()


def test_search_then_prune_by_its_profile(
    capsys, llava_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    code, stdout, _ = run(
        capsys, "search", llava_folder, "--output", tmp_path / "found", "--trials", 3,
        "--evaluation", text_file, "--no-progress", *small(text_file),
    )  # fmt: skip
    assert code == 0
    assert "in 3 trials" in stdout
    profile = tmp_path / "found/profile.json"
    code, stdout, _ = run(
        capsys, "prune", llava_folder, "--output", tmp_path / "pruned", "--profile", profile,
        "--metric", "ria", "--no-progress", *small(text_file),
    )  # fmt: skip
    assert code == 0
    assert "Removed 50.0" in stdout
    config = json.loads((tmp_path / "pruned/config.json").read_text())["quantization_config"]
    assert config["sparsity"] == json.loads(profile.read_text())["sparsity"]
    assert config["metric"] == "ria"


@pytest.mark.parametrize(
    ("profile", "ratios"),
    [
        (CompressionProfile(kv_cache=KVCacheConfig(8)), set()),
        (CompressionProfile(weight_bits={"*.mlp.*": 8}), {0.0}),
    ],
    ids=["kv bits", "weight bits"],
)
def test_a_profile_without_ratios_removes_nothing(
    capsys, llava_folder: Path, tmp_path: Path, profile: CompressionProfile, ratios: set[float]
) -> None:
    profile.save(tmp_path / "profile.json")
    arguments = [
        "prune", llava_folder, "--profile", tmp_path / "profile.json", "--no-progress",
    ]  # fmt: skip
    code, stdout, _ = run(capsys, *arguments, "--output", tmp_path / "out")
    assert code == 0  # without calibration data, which nothing reads
    assert "Removed 0.0000%" in stdout
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["target_sparsity"] == 0
    assert set(config["sparsity"].values()) == ratios
    code, stdout, _ = run(
        capsys, *arguments, "--output", tmp_path / "half", "--target-sparsity", 0.5,
        "--metric", "magnitude",
    )  # fmt: skip
    assert "Removed 50.0" in stdout


def test_a_search_of_kv_bits_alone_speaks_of_no_masks_and_shows_small_figures(
    capsys, llava_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    code, stdout, _ = run(
        capsys, "search", llava_folder, "--output", tmp_path / "found", "--trials", 2,
        "--target-sparsity", 0, "--kv-bits", "6,8", "--objective", "kl", "--evaluation", text_file,
        "--sequence-length", 128, "--evaluation-samples", 4, "--no-progress",
    )  # fmt: skip
    assert code == 0
    shown = re.search(r"^Best kl (\S+) \(uniform: (\S+)\) in 2 trials", stdout)
    assert shown is not None
    history = json.loads((tmp_path / "found/search.json").read_text())
    figures = (history["best_value"], history["uniform_value"])
    assert tuple(map(float, shown.groups())) == pytest.approx(figures, rel=1e-3)
    assert max(figures) < 1e-3


def test_the_objective_and_the_trials_are_called_what_they_are(
    capsys, llava_folder: Path, text_file: Path, question_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    few = ["--blocks", 2, "--sparsity-range", 0.025, "--kv-bits", "none", "--trials", 4]
    code, stdout, _ = run(
        capsys, "compress", llava_folder, "--output", out, "--objective", "accuracy", *few,
        "--quality", "paper", "--metric", "magnitude",
        "--evaluation", question_file, "--no-progress", *small(text_file),
    )  # fmt: skip
    assert code == 0
    rows = json.loads((out / "search.json").read_text())["history"]
    distinct = sum(row["duplicate_of"] is None for row in rows)
    assert distinct < len(rows)
    assert "one-shot questions missed " in stdout
    assert f", {distinct} trials." in stdout
    assert f"- Search: {distinct} trials\n" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("given", "bits"), [([], 6), (["--kv-bits", "8"], 8), (["--kv-bits", "none"], None)]
)
def test_prune_takes_kv_bits_which_override_the_profiles(
    capsys, llava_folder: Path, tmp_path: Path, given: list[str], bits: int | None
) -> None:
    profile = tmp_path / "profile.json"
    CompressionProfile(kv_cache=KVCacheConfig(bits=6)).save(profile)
    arguments = [llava_folder, "--output", tmp_path / "out", "--profile", profile, "--no-progress"]
    code, _, stderr = run(capsys, "prune", *arguments, *given)
    assert code == 0, stderr
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["target_sparsity"] == 0
    assert (config["kv_cache"] and config["kv_cache"]["key_bits"]) == (bits and [bits] * 4)


def test_kv_bits_change_nothing_else_of_a_profile(
    capsys, monkeypatch, llava_folder: Path, tmp_path: Path
) -> None:
    others = {"group_size": 32, "residual_length": 64, "key_mode": "token", "sink_length": 4}
    profile, out = tmp_path / "profile.json", tmp_path / "out"
    CompressionProfile(kv_cache=KVCacheConfig(key_bits=6, value_bits=8, **others)).save(profile)
    arguments = [llava_folder, "--output", out, "--profile", profile, "--kv-bits", 4]
    code, _, stderr = run(capsys, "prune", *arguments, "--no-progress")
    assert code == 0, stderr
    stored = json.loads((out / "config.json").read_text())["quantization_config"]["kv_cache"]
    assert stored == KVCacheConfig(bits=(4,) * 4, **others).to_dict()

    def measured(model: ModelSource, **options: object) -> None:
        raise ValueError(f"with {options['kv_cache']}")

    monkeypatch.setattr("hf_adaptive_sparse.cli.evaluate.evaluate", measured)
    for given, choice in [
        (["--kv-bits", "3"], KVCacheConfig(bits=3, **others)),
        (["--kv-bits", "none"], False),
        ([], None),
    ]:
        assert f"with {choice}" in run(capsys, "evaluate", out, *given)[2]


def test_prune_by_globs_without_data(capsys, llava_folder: Path, tmp_path: Path) -> None:
    code, stdout, _ = run(
        capsys, "prune", llava_folder, "--output", tmp_path / "out", "--metric", "magnitude",
        "--sparsity", "*.mlp.*=0.6", "--no-progress", "--json",
    )  # fmt: skip
    assert code == 0
    modules = {module["name"]: module["ratio"] for module in json.loads(stdout)["modules"]}
    assert all(
        ratio == pytest.approx(0.6 if ".mlp." in name else 0.0, abs=1e-3)
        for name, ratio in modules.items()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metric", "psychic"], "lognorm"),
        (["--target-sparsity", "1.5"], r"must be a number in \[0, 1\)"),
        (["--pattern", "five"], "pattern"),
        (["--sparsity", "*.mlp.*"], "GLOB=RATIO"),
        (["--sparsity", "nothing.*=0.5", "--metric", "magnitude"], "nothing"),
        (["--calibration", "missing.txt"], "missing.txt"),
        (["--checkpoint-format", "zip"], "bitmask"),
        (["--sparsity", "*.mlp.*=0.6", "--target-sparsity", "0.5"], "--target-sparsity 0.5, too"),
        (["--dtype", "floaty"], "a torch dtype, such as bfloat16, or auto, got 'floaty'"),
        (["--device-map", "cuda:99"], "a device that torch can use here, got 'cuda:99'"),
        (["--weight-group-size", "16"], "weights of 8 or 4 bits, got 16"),
        (["--weight-bits", "*.mlp.*=12", "--weight-group-size", "64"], "Give --weight-bits 8 or"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    capsys, llava_folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, stdout, stderr = run(
        capsys, "prune", llava_folder, "--output", tmp_path / "out", "--no-progress", *arguments
    )
    assert code == 2
    assert stdout == ""
    lines = [line for line in stderr.splitlines() if line.startswith("hf-adaptive-sparse prune:")]
    assert len(lines) == 1
    assert message.replace("\\", "") in lines[0]
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_a_model_that_does_not_exist(capsys, tmp_path: Path) -> None:
    code, _, stderr = run(capsys, "evaluate", tmp_path / "nothing")
    assert code == 2
    assert "nothing" in stderr
    assert "Traceback" not in stderr


def lose_a_layer(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {n: tensor for n, tensor in weights.items() if not re.search(r"1\.mlp\..*_proj", n)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def quantise(folder: Path, said: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": said}))


def lose_the_processor(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()


@pytest.mark.parametrize("command", ["prune", "compress", "evaluate"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_layer, "dense lacks 3 of the model's tensors, such as "),
        (truncate, "dense/model.safetensors: the header declares "),
        (lambda folder: (folder / "config.json").unlink(), "dense has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "dense is not valid JSON"),
        (
            lambda folder: (folder / "generation_config.json").write_text("[]"),
            "dense is not a JSON object",
        ),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": ["llava"]}'),
            "dense must be text, got ['llava']",
        ),
        (
            lambda folder: quantise(folder, {"quant_method": ["adaptive_sparse"]}),
            "dense must be text, got ['adaptive_sparse']",
        ),
        (lambda folder: quantise(folder, ["nf4"]), "dense must be an object, got ['nf4']"),
        (lose_the_processor, "dense has no tokenizer or processor"),
        (lambda folder: folder.rename(folder.with_name("away")), "There is no folder "),
    ],
)
def test_a_model_that_is_not_whole_is_refused_in_one_line(
    capsys, llava_folder: Path, tmp_path: Path, command: str, damage, message: str
) -> None:
    damage(llava_folder)
    output = [] if command == "evaluate" else ["--output", tmp_path / "out"]
    code, stdout, stderr = run(capsys, command, llava_folder, *output)
    assert (code, stdout) == (2, "")
    assert message in stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["prune", "evaluate", "bench"])
def test_a_folder_has_no_revision(capsys, llava_folder: Path, tmp_path: Path, command: str) -> None:
    output = ["--output", tmp_path / "out"] if command == "prune" else []
    code, stdout, stderr = run(capsys, command, llava_folder, *output, "--revision", "v1")
    assert (code, stdout) == (2, "")
    assert "dense' is a local folder: only a Hub repo has revision 'v1'" in stderr


@pytest.mark.parametrize("command", ["prune", "bench"])
def test_a_repo_that_cannot_be_reached_is_named(capsys, tmp_path: Path, command: str) -> None:
    output = ["--output", tmp_path / "out"] if command == "prune" else []
    code, stdout, stderr = run(capsys, command, "someone/lost", *output)
    assert (code, stdout) == (2, "")
    assert "someone/lost is no local folder, and cannot be read from the Hub: " in stderr
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_the_head_is_refused(capsys, llava_folder: Path, tmp_path: Path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 128}
    headless = BertModel(BertConfig(num_hidden_layers=1, num_attention_heads=2, **sizes))
    headless.save_pretrained(llava_folder)
    code, _, stderr = run(
        capsys, "prune", llava_folder, "--output", tmp_path / "out", "--metric", "magnitude"
    )
    assert code == 2
    assert "such as 'cls.predictions." in stderr
    assert "give a complete BertLMHeadModel" in stderr


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["prune", "model", "--output", "~/x"], "output"),
        (["search", "model", "--output=~/x"], "output"),
        (["compress", "model", "--output=out", "--storage=~/x"], "storage"),
        (["prune", "model", "--output=out", "--profile", "~/x"], "profile"),
        (["demo", "--output=~/x"], "output"),
        (["evaluate", "model", "--results", "~/x"], "results"),
        (["report", "~/x"], "source"),
        (["report", "study", "--output=~/x"], "output"),
    ],
)
def test_paths_below_the_home_folder(monkeypatch, tmp_path: Path, arguments: list[str], name: str):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert getattr(build_parser().parse_args(arguments), name) == str(tmp_path / "x")


def test_outputs_below_the_home_folder(monkeypatch, llava_folder: Path, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = SparsityConfig(metric="magnitude")
    done = prune_to_folder(ModelSource(llava_folder), "~/x", config, progress=False)
    assert done.output == tmp_path / "home" / "x"
    assert (done.output / "config.json").is_file()


@pytest.mark.parametrize(("command", "kept"), [("search", True), ("prune", False)])
def test_an_interruption_says_what_there_is_to_go_on_from(
    capsys, monkeypatch, tmp_path: Path, command: str, kept: bool
) -> None:
    partial = tmp_path / "out.adaptive-sparse.partial"

    def interrupted(options: object) -> None:
        partial.mkdir()
        (partial / "search.journal").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(f"hf_adaptive_sparse.cli.{command}.run_{command}", interrupted)
    code, out, err = run(capsys, command, "model", "--output", tmp_path / "out")
    assert (code, out) == (130, "")
    told = f"; the same command goes on from what is in {partial}." if kept else "."
    assert err == f"hf-adaptive-sparse: interrupted{told}\n"


@pytest.mark.parametrize(
    ("storage", "output", "told"),
    [
        ("s.log", None, "; the same command resumes study 'mine'."),
        ("s.log", "out", "; the same command resumes study 'mine'."),
        ("redis://:secret@host", None, "; the same command resumes study 'mine'."),
        ("missing.log", None, "."),
        (None, None, "."),
    ],
)
def test_an_interruption_names_the_study_that_the_same_command_resumes(
    capsys, monkeypatch, tmp_path: Path, storage: str | None, output: str | None, told: str
) -> None:
    def interrupted(options: object) -> None:
        Path("s.log").touch()
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_adaptive_sparse.cli.search.run_search", interrupted)
    given = [] if storage is None else ["--storage", storage, "--study", "mine"]
    given += [] if output is None else ["--output", output]
    assert run(capsys, "search", "model", *given) == (
        130,
        "",
        f"hf-adaptive-sparse: interrupted{told}\n",
    )


def test_an_interruption_within_a_bound_names_its_studies(
    capsys, monkeypatch, tmp_path: Path
) -> None:
    def interrupted(options: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "s.log").touch()
    monkeypatch.setattr("hf_adaptive_sparse.cli.search.run_search", interrupted)
    given = ("--max-loss", "1%", "--storage", tmp_path / "s.log", "--study", "mine")
    assert run(capsys, "search", "model", *given) == (
        130,
        "",
        "hf-adaptive-sparse: interrupted; the same command resumes its studies, which begin with "
        "'mine'.\n",
    )


def test_an_error_that_hides_an_interruption_is_one(capsys, monkeypatch, tmp_path: Path) -> None:
    def interrupted(options: object) -> None:
        try:
            raise KeyboardInterrupt
        except BaseException:
            os.unlink(tmp_path / "gone")
            raise

    monkeypatch.setattr("hf_adaptive_sparse.cli.search.run_search", interrupted)
    told = (130, "", "hf-adaptive-sparse: interrupted.\n")
    assert run(capsys, "search", "model", "--traceback") == told


def test_a_full_disk_is_one_line_and_leaves_nothing(llava_folder: Path, tmp_path: Path) -> None:
    arguments = ["prune", llava_folder, "--output", tmp_path / "out", "--metric", "magnitude"]
    done = subprocess.run(
        [sys.executable, "-m", "hf_adaptive_sparse", *map(str, arguments), "--no-progress"],
        capture_output=True,
        text=True,
        # Files may not grow beyond 64 KiB: what the write meets is the same as on a full disk.
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)),
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "The weights cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_a_bug_keeps_its_traceback_and_is_not_bad_input(capsys, monkeypatch) -> None:
    def broken(options: object) -> None:
        raise TypeError("NoneType has no length")

    monkeypatch.setattr("hf_adaptive_sparse.cli.evaluate.run_evaluate", broken)
    with pytest.raises(TypeError, match="has no length"):
        run(capsys, "evaluate", "model")


def test_a_model_below_the_home_folder(
    capsys, monkeypatch, llava_folder: Path, text_file: Path
) -> None:
    monkeypatch.setenv("HOME", str(llava_folder.parent))
    data = ["--evaluation", text_file, "--evaluation-samples", 2, "--sequence-length", 16]
    code, _, stderr = run(capsys, "evaluate", f"~/{llava_folder.name}", *data, "--no-progress")
    assert code == 0, stderr


def test_a_config_with_a_value_of_another_type_is_bad_input(capsys, llava_folder: Path) -> None:
    config = json.loads((llava_folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = "many"
    (llava_folder / "config.json").write_text(json.dumps(config))
    code, _, stderr = run(capsys, "evaluate", llava_folder)
    assert code == 2
    assert "'vocab_size' expected int, got str (value: 'many')" in stderr.splitlines()[-1]


def test_traceback_on_request(llava_folder: Path, tmp_path: Path) -> None:
    arguments = ["prune", str(llava_folder), "--output", str(tmp_path / "o"), "--metric", "psychic"]
    with pytest.raises(ValueError, match="psychic"):
        main([*arguments, "--traceback"])


def test_env_says_which_path_is_in_use(capsys) -> None:
    code, stdout, _ = run(capsys, "env", "--json")
    assert code == 0
    found = json.loads(stdout)
    assert found["versions"]["hf_adaptive_sparse"] == __version__
    for part in ("KV cache, CPU", "sparse weights, CPU"):
        assert found["kernels"][part] == describe_kernels()
    assert "optuna" in run(capsys, "env")[1]


@pytest.mark.parametrize(("available", "path"), [(True, "Triton"), (False, "torch")])
def test_env_says_what_computes_on_a_gpu(capsys, monkeypatch, available: bool, path: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_device, "is_available", lambda: available)
    kernels = json.loads(run(capsys, "env", "--json")[1])["kernels"]
    assert kernels["sparse weights, GPU"] == kernels["KV cache, GPU"] == path


def test_kv_bits_of_the_command_line() -> None:
    assert widths("6,8") == (6, 8)
    assert widths("None") is None


def test_usage_error_is_exit_code_2(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compress", "model", "--output", "x", "--kv-bits", "six"])
    assert stop.value.code == 2
    assert "joined by commas" in capsys.readouterr().err


def test_a_reader_that_has_gone_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "hf_adaptive_sparse", "env"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert (done.returncode, "BrokenPipeError" in done.stderr) == (0, False)


def test_module_is_runnable() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hf_adaptive_sparse", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == __version__


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {"target_sparsity": 0.5, "kv_bits": (6, 8), "kv_split": "equal"}),
        (
            [
                "--fit",
                "6GiB",
                "--context",
                "8192",
                "--batch",
                "2",
                "--search-weight-bits",
                "16,8,4",
            ],
            {
                "target_sparsity": "free",
                "fit_bytes": 6 * 2**30,
                "context_length": 8192,
                "batch_size": 2,
                "weight_bits": (4, 8, 16),
                "kv_split": "free",
            },
        ),
        (["--size", "4GB", "--target-sparsity", "0.6"], {"target_sparsity": 0.6}),
        (
            ["--kv-bits", "16,8,6,4,3,2", "--kv-mean-bits", "4", "--kv-apart"],
            {"kv_mean_bits": 4.0, "kv_apart": True, "kv_split": "free"},
        ),
        (
            [
                "--target-sparsity",
                "0",
                "--kv-bits",
                "none",
                "--search-weight-bits",
                "16,8",
                "--search-weight-mean",
                "12",
            ],
            {"target_sparsity": 0.0, "kv_bits": None, "weight_bits": (8, 16)},
        ),
        (
            ["--granularity", "layer-projection", "--sparsity-high", "0.7"],
            {"granularity": "layer-projection", "high": 0.7, "low": 0.45},
        ),
    ],
)
def test_options_make_the_space(flags, expected):
    options = build_parser().parse_args(["search", "m", "--output", "o", *flags])
    target = 0.5 if options.target_sparsity is None else options.target_sparsity
    config = SparsityConfig(target_sparsity=target)
    space = space_of(options, config, get_preset("best").space(config))
    assert {name: getattr(space, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "4G"], "must be a size of at least one byte"),
        (["--fit", "4GiB"], "--fit needs --context"),
        (["--context", "8", "--batch", "2"], "got --context and --batch without --fit"),
        (["--context", "8"], "got --context without --fit"),
        (
            ["--target-sparsity", "0", "--sparsity-low", "0.3"],
            "With --target-sparsity 0 there are no ratios to search, got --sparsity-low.",
        ),
        (["--blocks", "4", "--granularity", "layer"], "got --blocks 4 and --granularity layer."),
        (
            ["--sparsity-low", "0.3", "--sparsity-high", "0.7", "--sparsity-range", "0.1"],
            "got 0.1 with both bounds.",
        ),
        (
            ["--target-sparsity", "0", "--blocks", "4"],
            "With --target-sparsity 0 there are no ratios to search, got --blocks.",
        ),
        (
            ["--target-sparsity", "0", "--sparsity-range", "0.1"],
            "With --target-sparsity 0 there are no ratios to search, got --sparsity-range.",
        ),
        (["--size", "4GiB", "--sparsity-range", "0.1"], "got 0.1 with no target"),
        (["--kv-mean-bits", "9"], "kv_mean_bits must lie between"),
        (["--search-weight-bits", "16,8,4"], "16,8,4 leaves the mean open. Give --search-weight"),
        (["--search-weight-mean", "8"], "--search-weight-mean 8 needs the widths"),
    ],
)
def test_options_that_contradict_each_other_are_refused(flags, message, capsys, demo_checkpoint):
    arguments = ["search", str(demo_checkpoint), "--output", "o", *flags]
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_a_pattern_without_bits_to_search_is_refused_with_the_way_out(capsys, demo_checkpoint):
    arguments = ["compress", demo_checkpoint, "--output", "o", "--pattern", "2:4"]
    for more in ([], ["--target-sparsity", "0.5"]):
        code, _, error = run(capsys, *arguments, "--kv-bits", "none", *more)
        assert code == 2
        assert "--pattern 2:4 fixes every ratio" in error
        assert "the command prune" in error


@pytest.mark.parametrize("command", ["prune", "compress"])
def test_offloading_computes_on_the_cpu(command, capsys, llava_folder, tmp_path):
    arguments = [command, llava_folder, "--output", tmp_path / "out", "--offload"]
    assert main([str(part) for part in (*arguments, "--device-map", "cuda:0")]) == 2
    assert "--offload or --device-map" in capsys.readouterr().err


def test_experts_need_a_token_at_least(capsys, llava_folder, tmp_path):
    arguments = ["prune", llava_folder, "--output", tmp_path / "out", "--min-expert-tokens", "0"]
    assert main([str(part) for part in arguments]) == 2
    assert "min_expert_tokens" in capsys.readouterr().err
