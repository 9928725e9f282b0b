"""The Hub over HTTP: the real client against a small server on loopback."""

from __future__ import annotations

import json
import socket
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedModel

from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.checkpoint.plugin import apply_config
from hf_adaptive_sparse.cli import main
from hf_adaptive_sparse.hub import HubError, inspect, push_folder
from hf_adaptive_sparse.hub.license import license_of
from hf_adaptive_sparse.hub.push import folder_files
from hf_adaptive_sparse.packing.bitmask import compress
from hf_adaptive_sparse.profiles import KVCacheConfig
from hf_adaptive_sparse.report import CardFacts, write_model_card
from tests.conftest import llama_config
from tests.hub_server import READER, WRITER, Blob, HubServer, run_online, running_hub

REPO = "user/tiny"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A running hub; the client in this process is online, without xet, with a cache of its own."""
    for name, value in {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with running_hub() as server:
        yield server


def write_compressed(
    folder: Path,
    model: PreTrainedModel,
    *,
    ratio: float = 0.5,
    shards: int = 1,
    prefix: tuple[str, str] = ("", ""),
    **changes: object,
) -> Path:
    """Write a compressed checkpoint by the format's definition, with magnitude masks.

    Args:
        folder: Where to.
        model: The dense model.
        ratio: Ratio of every linear in a layer.
        shards: Files the weights are spread over.
        prefix: Start of the runtime names, and what stands for it in the files.
        changes: Keys of quantization_config to change.
    """
    tensors, sparsity = {}, {}
    for name, weight in model.state_dict().items():
        stored = prefix[1] + name.removeprefix(prefix[0]) if prefix[0] else name
        if name == "lm_head.weight":
            continue
        if name.endswith("_proj.weight") and "layers" in name and "vision" not in name:
            count = round(ratio * weight.numel())
            removed = weight.abs().flatten().argsort()[:count]
            pruned = weight.clone()
            pruned.view(-1)[removed] = 0
            values, bitmask = compress(pruned)
            stem = stored.removesuffix(".weight")
            tensors[f"{stem}.weight_values"], tensors[f"{stem}.weight_bitmask"] = values, bitmask
            sparsity[name.removesuffix(".weight")] = count / weight.numel()
        else:
            tensors[stored] = weight.clone()
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        names = sorted(tensors)
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: tensors[name] for name in names[shard::shards]}
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    ours = SparsityConfig(
        target_sparsity=ratio,
        metric="magnitude",
        sparsity=sparsity,
        kv_cache=KVCacheConfig(bits=(8, 6, 6, 8)),
        provenance={"base_model": "someone/dense"},
    ).to_dict()
    ours.pop("defaulted", None)
    config = model.config.to_dict() | {"quantization_config": {**ours, **changes}}
    config["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n\n# tiny\n")
    return folder


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: LlamaForCausalLM) -> Path:
    return write_compressed(tmp_path / "compressed", tiny_llama)


def push(hub: HubServer, folder: Path, token: str | None = WRITER, **arguments: object) -> str:
    return push_folder(folder, REPO, token=token, endpoint=hub.endpoint, **arguments)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# Push


def test_push_makes_the_repo_in_one_commit(hub: HubServer, folder: Path) -> None:
    url = push(hub, folder, commit_message="First")
    repo = hub.repos[REPO]
    head = repo.history()[0]
    assert url == f"{hub.endpoint}/{REPO}/commit/{head.sha}"
    assert (head.title, head.files["model.safetensors"].lfs) == ("First", True)
    found = hub.files(REPO)
    found.pop(".gitattributes")
    assert found == contents(folder)
    assert sum("/commit/" in request.path for request in hub.requests) == 1
    assert not repo.private


def test_a_pushed_card_names_its_repo(hub: HubServer, folder: Path) -> None:
    card = folder / "README.md"
    write_model_card(folder, facts=CardFacts(base_model="someone/llava"))
    assert b'repo = "path/to/this/folder"' in card.read_bytes()
    push(hub, folder)
    pushed = hub.files(REPO)["README.md"]
    assert f'repo = "{REPO}"'.encode() in pushed
    assert b"path/to" not in pushed
    assert b"path/to" in card.read_bytes()


def test_the_command_says_whether_it_pushed(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    told = []
    for options in ([], [], ["--json"]):
        assert main(["push", str(folder), REPO, *options]) == 0
        told.append(capsys.readouterr().out.strip())
    url = f"{hub.endpoint}/{REPO}/commit/{hub.repos[REPO].history()[0].sha}"
    assert told[:2] == [f"Pushed: {url}", f"Nothing to push: {REPO} already holds this folder."]
    assert json.loads(told[2]) == {"commit_url": url, "pushed": False}


def test_push_again_without_a_change_makes_no_commit(hub: HubServer, folder: Path) -> None:
    first = push(hub, folder)
    commits = len(hub.repos[REPO].history())
    assert push(hub, folder) == first
    assert len(hub.repos[REPO].history()) == commits


def test_private_repo(hub: HubServer, folder: Path) -> None:
    push(hub, folder, private=True)
    assert hub.repos[REPO].private


def test_private_push_never_lands_in_a_public_repo(hub: HubServer, folder: Path) -> None:
    hub.add_repo(REPO)
    with pytest.raises(HubError, match="exists and is public"):
        push(hub, folder, private=True)
    assert hub.files(REPO) == {}


def test_stale_weights_leave_in_the_same_commit(
    hub: HubServer, tmp_path: Path, tiny_llama: LlamaForCausalLM
) -> None:
    push(hub, write_compressed(tmp_path / "three", tiny_llama, shards=3))
    files = hub.repos[REPO].history()[0].files
    for name in ("pytorch_model.bin", "notes.safetensors.txt", "models/draft.safetensors"):
        files[name] = files["config.json"]
    before = len(hub.repos[REPO].history())
    push(hub, write_compressed(tmp_path / "one", tiny_llama))
    assert sorted(hub.files(REPO)) == [
        ".gitattributes",
        "README.md",
        "config.json",
        "model.safetensors",
        "models/draft.safetensors",
        "notes.safetensors.txt",
    ]
    assert len(hub.repos[REPO].history()) == before + 1


def test_what_a_sharded_save_left_beside_the_single_file_stays_behind(
    hub: HubServer, tmp_path: Path, tiny_llama: LlamaForCausalLM
) -> None:
    folder = write_compressed(tmp_path / "model", tiny_llama, shards=2)
    write_compressed(folder, tiny_llama, ratio=0.25)
    with pytest.raises(ValueError, match=r"hold the weights once.*Remove the older"):
        push(hub, folder)
    (folder / "model-00001-of-00002.safetensors").unlink()
    push(hub, folder)
    expected = {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert set(hub.files(REPO)) == expected


def test_unfinished_and_hidden_files_stay_behind(hub: HubServer, folder: Path) -> None:
    for name in (".cache/x", ".secret", "search.json.partial", "study.db-wal"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    (folder / "plots").mkdir()
    (folder / "plots" / "history.png").write_bytes(b"png")
    push(hub, folder)
    assert set(hub.files(REPO)) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "model.safetensors",
        "plots/history.png",
    }


def test_push_to_a_branch_leaves_main(hub: HubServer, folder: Path) -> None:
    push(hub, folder, revision="v2/trial")
    assert set(hub.files(REPO)) == {".gitattributes"}
    assert hub.files(REPO, "v2/trial")["config.json"] == (folder / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("method", "pattern", "status"),
    [
        ("PUT", "/lfs/", 403),
        ("PUT", "/lfs/", None),
        ("POST", "/lfs/verify", 404),
        ("POST", "/commit/", None),
        ("POST", "/commit/", 503),
    ],
)
def test_interrupted_push_leaves_the_old_version(
    hub: HubServer,
    tmp_path: Path,
    tiny_llama: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    pattern: str,
    status: int | None,
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    push(hub, write_compressed(tmp_path / "old", tiny_llama, ratio=0.25, shards=2))
    old, head = hub.files(REPO), hub.repos[REPO].history()[0].sha
    new = write_compressed(tmp_path / "new", tiny_llama, ratio=0.5)
    hub.fail(method, pattern, status, times=100)
    with pytest.raises(HubError, match="Cannot push to 'user/tiny'"):
        push(hub, new)
    assert hub.files(REPO) == old
    assert hub.repos[REPO].history()[0].sha == head
    hub.failures.clear()
    push(hub, new)
    assert "model-00001-of-00002.safetensors" not in hub.files(REPO)


def test_a_hub_that_fails_once_is_asked_again(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.fail("PUT", "/lfs/", 500)
    push(hub, folder)
    assert [r.status for r in hub.requests if r.method == "PUT"] == [500, 200]


def test_a_commit_that_came_in_between_is_not_overwritten(hub: HubServer, folder: Path) -> None:
    push(hub, folder)
    hub.fail("POST", "/commit/", 412)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    with pytest.raises(HubError, match=r"committed to it meanwhile \(412: .*\. Look at"):
        push(hub, folder)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (409, r"changed by someone else \(409: injected failure\)\. Look at the change"),
        (413, r"too large for the Hub \(413: .*max_shard_size"),
        (429, r"more requests than the Hub allows \(429: .*Wait some minutes"),
        (418, "the Hub answered 418: injected failure"),
    ],
)
def test_a_refused_commit_says_what_to_do(
    hub: HubServer, folder: Path, status: int, message: str
) -> None:
    hub.fail("POST", "/commit/", status)
    with pytest.raises(HubError, match=message):
        push(hub, folder)


def test_a_token_that_may_not_read_is_not_asked_to_write(hub: HubServer, folder: Path) -> None:
    push(hub, folder)
    hub.fail("GET", f"/api/models/{REPO}", 403)
    with pytest.raises(HubError, match=r"\(403: injected failure\)\. Use one with the right to it"):
        inspect(REPO, endpoint=hub.endpoint)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "needs a token with write access; run `hf auth login`.* token= in Python"),
        ("hf_wrong", r"refused the token \(401\)"),
        (READER, r"the token may not do that \(403"),
    ],
)
def test_missing_refused_and_weak_tokens(
    hub: HubServer, folder: Path, token: str | None, message: str
) -> None:
    with pytest.raises(HubError, match=message) as error:
        push(hub, folder, token=token)
    assert "\n" not in str(error.value)
    assert hub.repos == {}


def test_someone_elses_namespace(hub: HubServer, folder: Path) -> None:
    with pytest.raises(HubError, match="403"):
        push_folder(folder, "other/tiny", token=WRITER, endpoint=hub.endpoint)


def test_existing_repo_is_refused_where_asked(hub: HubServer, folder: Path) -> None:
    hub.add_repo(REPO)
    with pytest.raises(HubError, match="exists already"):
        push(hub, folder, exist_ok=False)


def test_metadata_the_hub_rejects(hub: HubServer, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n")
    with pytest.raises(HubError, match="the yaml block is not closed"):
        push(hub, folder)


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_offline_mode_is_named_before_the_folder_is_read(hub, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="offline mode is on"):
        push_folder(tmp_path / "absent", REPO, token=WRITER, endpoint=hub.endpoint)


def test_no_network(hub: HubServer, folder: Path) -> None:
    endpoint = closed_port()
    with pytest.raises(HubError, match="no connection to the Hub") as error:
        push_folder(folder, REPO, token=WRITER, endpoint=endpoint)
    assert "\n" not in str(error.value)
    with pytest.raises(HubError, match="no connection to the Hub"):
        inspect(REPO, endpoint=endpoint)


def test_offline_mode(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="Unset HF_HUB_OFFLINE"):
        push(hub, folder)


@pytest.mark.parametrize("repo_id", ["a/b/c", "user/../x", "", "user/na me", "https://x.y/z"])
def test_invalid_repo_ids(hub: HubServer, folder: Path, repo_id: str) -> None:
    with pytest.raises(ValueError, match="A repo id must be 'owner/name'"):
        push_folder(folder, repo_id, token=WRITER, endpoint=hub.endpoint)
    assert hub.requests == []


def test_incomplete_folders_send_nothing(
    hub: HubServer, tmp_path: Path, tiny_llama: LlamaForCausalLM
) -> None:
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            push(hub, folder)

    refused(tmp_path / "absent", "There is no folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no config.json: it is not a complete")
    (tmp_path / "empty/adapter_config.json").write_text("{}")
    refused(tmp_path / "empty", r"a PEFT adapter alone\. Merge it .*merge_and_unload\(\)")
    tiny_llama.save_pretrained(tmp_path / "dense")
    refused(tmp_path / "dense", "was not compressed by hf_adaptive_sparse")
    sharded = write_compressed(tmp_path / "sharded", tiny_llama, shards=2)
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refused(sharded, "lacks model-00002-of-00002.safetensors")
    cut = write_compressed(tmp_path / "cut", tiny_llama) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-10])
    refused(cut.parent, "truncated or damaged")
    lost = write_compressed(tmp_path / "lost", tiny_llama)
    config = json.loads((lost / "config.json").read_text())
    config["quantization_config"]["sparsity"]["model.layers.9.mlp.up_proj"] = 0.5
    (lost / "config.json").write_text(json.dumps(config))
    refused(lost, "'model.layers.9.mlp.up_proj' is compressed, but the files hold no bitmask")
    assert hub.requests == []


# Inspect


def test_inspect_fetches_under_one_percent_of_the_weights(hub: HubServer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = llama_config(hidden_size=512, intermediate_size=1408, num_attention_heads=32)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    folder = write_compressed(tmp_path / "big", model, shards=2)
    push(hub, folder)
    weight_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    hub.requests.clear()
    remote = inspect(REPO, endpoint=hub.endpoint)
    # Shards come from storage, small files from the repo.
    fetched = hub.sent_bytes("/lfs/") + hub.sent_bytes(r"\.safetensors$")
    assert 0 < fetched < weight_bytes / 100
    assert all(r.range is not None for r in hub.requests if r.path.startswith("/lfs/"))
    local = inspect(folder)
    assert remote.modules == local.modules
    assert remote.sparsity == local.sparsity == (0.5, 0.5)
    assert remote.revision == hub.repos[REPO].history()[0].sha


def test_a_folder_below_the_home_folder(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    name = f"~/{folder.name}"
    assert inspect(name).source == str(folder)
    push(hub, name)
    assert "model.safetensors" in hub.repos[REPO].history()[0].files
    with pytest.raises(ValueError, match="There is no folder '~/missing'"):
        inspect("~/missing")


def test_inspect_local_folder(folder: Path) -> None:
    found = inspect(folder)
    assert found.sparsity == (0.5, 0.5)
    assert (found.base_model, found.metric, found.checkpoint_format) == (
        "someone/dense",
        "magnitude",
        "bitmask",
    )
    assert len(found.modules) == 28
    down = next(m for m in found.modules if m.name == "model.layers.2.mlp.down_proj")
    assert (down.rows, down.columns, down.nnz) == (64, (160, 160), 64 * 160 // 2)
    assert down.stored_bytes == 64 * 160 // 2 * 4 + 64 * 20
    assert down.dense_bytes == 64 * 160 * 4
    assert found.layer_ratios() == dict.fromkeys(range(4), 0.5)
    assert sum(found.size_bytes.values()) < (folder / "model.safetensors").stat().st_size
    text = str(found)
    assert "50.00% of 28 linears (target 50.00%)" in text
    assert text.splitlines()[-1].split() == ["3", "50.00%", "8", "8"]
    data = json.loads(json.dumps(found.to_dict()))
    assert data["sparsity"] == 0.5
    assert data["kv_cache"]["key_bits"] == [8, 6, 6, 8]
    assert data["layer_ratios"]["3"] == 0.5


def test_inspect_of_a_model_that_is_not_pruned_says_what_is_there(
    tmp_path: Path, tiny_llava: PreTrainedModel
) -> None:
    kv_cache = KVCacheConfig(key_bits=(8, 6, 6, 8), value_bits=4)
    apply_config(tiny_llava, SparsityConfig(target_sparsity=0.0, kv_cache=kv_cache), progress=False)
    tiny_llava.save_pretrained(tmp_path / "kv")
    text = str(inspect(tmp_path / "kv"))
    assert "lognorm" not in text
    assert "linears" not in text
    assert "pruned weights" not in text
    assert "keys of 6 or 8 bits, values of 4, groups of 64" in text
    rows = [line.split() for line in text.splitlines()[-5:]]
    assert [row[:2] for row in rows[1:]] == [["0", "8"], ["1", "6"], ["2", "6"], ["3", "8"]]
    config = SparsityConfig(target_sparsity=0.0, weight_bits=8)
    apply_config(tiny_llava, config, progress=False)
    tiny_llava.save_pretrained(tmp_path / "bits")
    found = inspect(tmp_path / "bits")
    assert [m.name for m in found.modules] == list(found.weight_bits)
    assert found.sparsity == (0.0, 0.0)
    assert "quantised weights" in str(found)
    assert "8 bits in 28 linears" in str(found)


def test_weights_rounded_to_zero_are_not_counted_as_removed(
    tmp_path: Path, tiny_llama: LlamaForCausalLM
) -> None:
    config = SparsityConfig(pattern="2:4", metric="magnitude", weight_bits=4)
    apply_config(tiny_llama, config, progress=False)
    tiny_llama.save_pretrained(tmp_path)
    found = inspect(tmp_path)
    zeros = sum(module.rows * module.columns[0] - module.nnz for module in found.modules)
    numel = sum(module.rows * module.columns[0] for module in found.modules)
    assert zeros > numel / 2
    assert found.sparsity == (0.5, 0.5)
    assert set(found.layer_ratios().values()) == {0.5}


def test_layers_without_a_ratio_have_their_kv_bits_shown(
    tmp_path: Path, tiny_llama: LlamaForCausalLM
) -> None:
    kv_cache = KVCacheConfig(bits=(8, 6, 6, 8))
    config = SparsityConfig(
        metric="magnitude", kv_cache=kv_cache, modules_to_not_convert=["model.layers.[023].*"]
    )
    apply_config(tiny_llama, config, progress=False)
    tiny_llama.save_pretrained(tmp_path)
    rows = [line.split() for line in str(inspect(tmp_path)).splitlines()[-4:]]
    assert rows[1] == ["1", "50.00%", "6", "6"]
    assert rows[3] == ["3", "–", "8", "8"]


def test_inspect_reads_the_weights_that_transformers_loads(
    hub: HubServer, tmp_path: Path, tiny_llama: LlamaForCausalLM
) -> None:
    sharded = write_compressed(tmp_path / "sharded", tiny_llama, shards=2)
    push(hub, sharded)
    hub.repos[REPO].history()[0].files["model.safetensors"] = Blob(
        (write_compressed(sharded, tiny_llama, ratio=0.25) / "model.safetensors").read_bytes(), True
    )
    loaded = LlamaForCausalLM.from_pretrained(sharded)
    zeros = (loaded.model.layers[0].mlp.up_proj.weight == 0).float().mean()
    assert float(zeros) == pytest.approx(0.25)
    assert inspect(sharded).sparsity[0] == pytest.approx(0.25)
    assert inspect(REPO, endpoint=hub.endpoint).sparsity[0] == pytest.approx(0.25)


def test_inspect_renamed_weights(tmp_path: Path, tiny_llava: PreTrainedModel) -> None:
    prefix = ("model.language_model.", "language_model.model.")
    folder = write_compressed(tmp_path / "llava", tiny_llava, prefix=prefix)
    names = [module.name for module in inspect(folder).modules]
    assert names[0] == "model.language_model.layers.0.self_attn.q_proj"
    assert len(names) == 28
    # A module of ratio 0 is stored dense, and the vision tower has modules of the same ending.
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    name = "layers.0.self_attn.q_proj"
    config["quantization_config"]["sparsity"][f"model.language_model.{name}"] = 0.0
    for kind in ("values", "bitmask"):
        del tensors[f"language_model.model.{name}.weight_{kind}"]
    tensors[f"language_model.model.{name}.weight"] = torch.zeros(64, 64)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    first = inspect(folder).modules[0]
    assert (first.name, first.columns, first.nnz) == (
        f"model.language_model.{name}",
        (64, 64),
        None,
    )


def test_widths_that_are_no_multiple_of_eight(tmp_path: Path) -> None:
    model = LlamaForCausalLM(llama_config(hidden_size=60, intermediate_size=101))
    folder = write_compressed(tmp_path / "odd", model, ratio=0.3)
    found = inspect(folder)
    down = next(m for m in found.modules if m.name.endswith("down_proj"))
    assert down.columns == (101, 101)
    exact = 1 - sum(m.nnz for m in found.modules) / sum(
        module.weight.numel() for name, module in model.named_modules() if name.endswith("_proj")
    )
    assert found.sparsity == (pytest.approx(exact), pytest.approx(exact))


def test_unknown_widths_give_bounds(tmp_path: Path) -> None:
    model = LlamaForCausalLM(llama_config(hidden_size=60, intermediate_size=101))
    folder = write_compressed(tmp_path / "odd", model, ratio=0.3)
    config = json.loads((folder / "config.json").read_text())
    config["hidden_size"] = config["intermediate_size"] = config["head_dim"] = None
    ratios = config["quantization_config"]["sparsity"]
    # Weights that were zero before pruning: fewer are stored than the recorded ratio tells.
    config["quantization_config"]["sparsity"] = dict.fromkeys(ratios, 0.29)
    (folder / "config.json").write_text(json.dumps(config))
    found = inspect(folder)
    low, high = found.sparsity
    assert low < 0.3 < high
    assert " to " in str(found)
    assert found.to_dict()["sparsity"] == [low, high]


def test_weights_rounded_to_zero_where_the_widths_are_unknown(tmp_path: Path) -> None:
    model = LlamaForCausalLM(llama_config(hidden_size=60, intermediate_size=101))
    config = SparsityConfig(target_sparsity=0.3, metric="magnitude", weight_bits=4)
    apply_config(model, config, progress=False)
    model.save_pretrained(tmp_path)
    for unknown in ({}, dict.fromkeys(("hidden_size", "intermediate_size", "head_dim"))):
        saved = json.loads((tmp_path / "config.json").read_text()) | unknown
        (tmp_path / "config.json").write_text(json.dumps(saved))
        found = inspect(tmp_path)
        assert found.sparsity == pytest.approx((0.3, 0.3), abs=1e-4)
        assert "30.00% of 28 linears" in str(found)
        for module in found.modules:
            assert module.columns[0] <= model.get_submodule(module.name).in_features
            assert module.columns[1] >= model.get_submodule(module.name).in_features


def test_dense_format_reports_the_record(tmp_path: Path, tiny_llama: LlamaForCausalLM) -> None:
    folder = tmp_path / "dense"
    tiny_llama.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    sparsity = {f"model.layers.{i}.mlp.up_proj": 0.25 for i in range(4)}
    ours = SparsityConfig(sparsity=sparsity, checkpoint_format="dense", metric="magnitude")
    config["quantization_config"] = ours.to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    found = inspect(folder)
    assert found.checkpoint_format == "dense"
    assert found.sparsity == (0.25, 0.25)
    assert [module.nnz for module in found.modules] == [None] * 4
    assert found.kv_cache is None


def test_inspect_by_revision(hub: HubServer, tmp_path: Path, tiny_llama: LlamaForCausalLM) -> None:
    push(hub, write_compressed(tmp_path / "a", tiny_llama, ratio=0.25))
    first = hub.repos[REPO].history()[0].sha
    HfApi(endpoint=hub.endpoint, token=WRITER).create_tag(REPO, tag="v1")
    push(hub, write_compressed(tmp_path / "b", tiny_llama, ratio=0.5))
    for revision, ratio in ((None, 0.5), ("main", 0.5), (first, 0.25), ("v1", 0.25)):
        assert inspect(REPO, revision=revision, endpoint=hub.endpoint).sparsity == (ratio, ratio)
    with pytest.raises(HubError, match="no revision 'v9'"):
        inspect(REPO, revision="v9", endpoint=hub.endpoint)


def test_repos_that_cannot_be_read(hub: HubServer, folder: Path) -> None:
    files = contents(folder)
    hub.add_repo("user/hidden", files, private=True)
    hub.add_repo("user/gated", files, gated=True)
    for repo_id, message in (
        ("user/absent", "no such repo, or it is private"),
        ("user/hidden", "no such repo, or it is private"),
        ("user/gated", "it is gated. Ask for access"),
    ):
        with pytest.raises(HubError, match=message) as error:
            inspect(repo_id, endpoint=hub.endpoint)
        assert "\n" not in str(error.value)
    assert inspect("user/hidden", token=READER, endpoint=hub.endpoint).sparsity == (0.5, 0.5)
    with pytest.raises(HubError, match="refused the token"):
        inspect("user/hidden", token="hf_wrong", endpoint=hub.endpoint)


def test_the_token_does_not_go_to_the_storage(hub: HubServer, folder: Path) -> None:
    push(hub, folder, private=True)
    hub.requests.clear()
    inspect(REPO, token=READER, endpoint=hub.endpoint)
    assert {r.authorized for r in hub.requests if r.path.startswith("/lfs/")} == {False}
    assert {r.authorized for r in hub.requests if REPO in r.path} == {True}


def test_a_server_without_ranges_is_hung_up_on(hub: HubServer, folder: Path) -> None:
    hub.honour_ranges = False
    push(hub, folder)
    assert inspect(REPO, endpoint=hub.endpoint).sparsity == (0.5, 0.5)


def header_of(entry: dict[str, object], length: int | None = None, data: int = 8) -> bytes:
    header = json.dumps({"x.weight": entry}).encode()
    return (length or len(header)).to_bytes(8, "little") + header + bytes(data)


HUGE = {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}


@pytest.mark.parametrize(
    "content",
    [
        header_of(HUGE),
        header_of({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, length=2**60),
        header_of({"dtype": "F32", "shape": [10**9], "data_offsets": [0, 8]}),
        header_of({"dtype": "F32", "shape": ["a", 10**12], "data_offsets": [0, 8]}),
        header_of({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}),
        header_of({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}),
        b"[" * 10**5,
        b"\x05\0\0\0\0\0\0\0[[[[[",
        b"",
    ],
)
def test_a_header_that_lies_is_refused_without_allocation(
    hub: HubServer, folder: Path, content: bytes
) -> None:
    files = contents(folder) | {"model.safetensors": content}
    hub.add_repo(REPO, files)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            inspect(REPO, endpoint=hub.endpoint)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()


def test_future_format_version(tmp_path: Path, tiny_llama: LlamaForCausalLM) -> None:
    folder = write_compressed(tmp_path / "future", tiny_llama, format_version=99)
    with pytest.raises(ValueError, match="format_version 99"):
        inspect(folder)


def test_an_index_cannot_name_files_outside(tmp_path: Path, tiny_llama: LlamaForCausalLM) -> None:
    folder = write_compressed(tmp_path / "sharded", tiny_llama, shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../secret.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not the name of a file"):
        inspect(folder)


def test_an_index_that_disagrees_with_its_shards(
    tmp_path: Path, tiny_llama: LlamaForCausalLM
) -> None:
    folder = write_compressed(tmp_path / "sharded", tiny_llama, shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["extra"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"'extra'.*stored in nowhere"):
        inspect(folder)


def test_neither_folder_nor_repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for name in ("/no/such/folder", "./missing", "a/b/c", "file"):
        with pytest.raises(ValueError, match="There is no folder"):
            inspect(name)


def test_a_folder_has_no_revisions(folder: Path) -> None:
    with pytest.raises(ValueError, match="local folder"):
        inspect(folder, revision="main")


def test_configs_that_are_no_configs(folder: Path) -> None:
    def refused(config: str, message: str) -> None:
        (folder / "config.json").write_text(config)
        with pytest.raises(ValueError, match=message):
            inspect(folder)

    good = json.loads((folder / "config.json").read_text())
    refused("{", "not valid JSON")
    refused("[" * 100_000, "not valid JSON")
    refused("[]", "not a JSON object")
    good["quantization_config"]["sparsity"] = [1]
    refused(json.dumps(good), r"config\.json of .*sparsity must be")
    (folder / "model.safetensors").unlink()
    good["quantization_config"]["sparsity"] = {}
    refused(json.dumps(good), r"has neither model\.safetensors nor")


def test_values_without_a_bitmask_and_too_many_values(
    tmp_path: Path, tiny_llama: LlamaForCausalLM
) -> None:
    folder = write_compressed(tmp_path / "damaged", tiny_llama)
    file = folder / "model.safetensors"
    tensors, stem = load_file(file), "model.layers.0.mlp.up_proj"
    surplus = torch.zeros(160 * 64 + 1)
    save_file(tensors | {f"{stem}.weight_values": surplus}, file)
    with pytest.raises(ValueError, match="10241 values for a bitmask of 10240 bits"):
        inspect(folder)
    del tensors[f"{stem}.weight_bitmask"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"up_proj\.weight_values' has no bitmask"):
        inspect(folder)


def test_names_from_a_repo_cannot_steer_the_terminal(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["provenance"]["base_model"] = "evil\x1b[2J\n"
    (folder / "config.json").write_text(json.dumps(config))
    assert "evil?[2J?" in str(inspect(folder))


# License


OTHER = {"license": "other", "license_name": "ours", "license_link": "LICENSE.md"}


def card(**metadata: str) -> bytes:
    lines = "".join(f"{key}: {value}\n" for key, value in metadata.items())
    return f"---\n{lines}---\n\n# A model\n".encode()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (card(license="apache-2.0", base_model="someone/else"), {"license": "apache-2.0"}),
        (card(**OTHER), {"license": "other", "license_name": "ours"}),
        (card(**OTHER | {"license_link": "https://example.org/x"}),
         OTHER | {"license_link": "https://example.org/x"}),
        (card(library_name="transformers"), {}),
        (b"# No metadata", {}),
        (b"---\nlicense: [mit\n---\n", {}),
        (b"---\nlicense: [mit]\n---\n", {}),
        (b"\xff\xfe", {}),
        (None, {}),
    ],
)  # fmt: skip
def test_license_of_a_folder(tmp_path: Path, content: bytes | None, expected: object) -> None:
    if content is not None:
        (tmp_path / "README.md").write_bytes(content)
    assert license_of(tmp_path) == expected


def test_license_of_a_repo(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    address = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    hub.add_repo(REPO, {"README.md": card(**OTHER)})
    hub.add_repo("user/bare", {"config.json": b"{}"})
    page = f"https://huggingface.co/{REPO}/blob"
    assert license_of(REPO) == OTHER | {"license_link": f"{page}/main/LICENSE.md"}
    sha = hub.repos[REPO].history()[0].sha
    assert license_of(REPO, sha)["license_link"] == f"{page}/{sha}/LICENSE.md"
    assert license_of("user/bare") == license_of("user/absent") == {}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert license_of("user/never-seen") == {}


# Through transformers


@pytest.mark.slow
def test_load_by_repo_id_and_revision(
    hub: HubServer, tmp_path: Path, tiny_llama: LlamaForCausalLM
) -> None:
    push(hub, write_compressed(tmp_path / "a", tiny_llama, ratio=0.25))
    first = hub.repos[REPO].history()[0].sha
    push(hub, write_compressed(tmp_path / "b", tiny_llama, ratio=0.5, shards=2))
    script = f"""
import hf_adaptive_sparse, torch
from transformers import AutoModelForCausalLM
for revision in ("main", {first!r}):
    model = AutoModelForCausalLM.from_pretrained({REPO!r}, revision=revision)
    weight = model.model.layers[1].mlp.up_proj.weight
    out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    print(float((weight == 0).float().mean()), out.shape[1])
"""
    lines = run_online(hub, tmp_path / "home", script).split("\n")
    assert [float(line.split()[0]) for line in lines[:2]] == [0.5, 0.25]
    assert all(3 < int(line.split()[1]) <= 7 for line in lines[:2])


@pytest.mark.slow
def test_push_to_hub_of_a_compressed_model(
    hub: HubServer, tmp_path: Path, tiny_llama: LlamaForCausalLM
) -> None:
    dense = tmp_path / "dense"
    tiny_llama.save_pretrained(dense)
    script = f"""
import hf_adaptive_sparse as has, torch
from transformers import AutoModelForCausalLM
kv_cache = has.KVCacheConfig(bits=8)
config = has.SparsityConfig(target_sparsity=0.5, metric="magnitude", kv_cache=kv_cache)
model = AutoModelForCausalLM.from_pretrained({str(dense)!r}, sparsity_config=config)
model.push_to_hub({REPO!r}, private=True)
again = AutoModelForCausalLM.from_pretrained({REPO!r})
states = model.state_dict().items(), again.state_dict().items()
same = all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(*states, strict=True))
print(same, again.config.quantization_config.kv_cache.bits)
"""
    assert run_online(hub, tmp_path / "home", script).split()[0] == "True"
    assert hub.repos[REPO].private
    found = inspect(REPO, token=READER, endpoint=hub.endpoint)
    assert found.sparsity == (0.5, 0.5)
    assert found.checkpoint_format == "bitmask"


def test_a_searchs_storage_stays_at_home(tmp_path: Path) -> None:
    for name in ("config.json", "search.json", "search.journal", "study.db-wal", ".hidden"):
        (tmp_path / name).write_text("{}")
    assert list(folder_files(tmp_path)) == ["config.json", "search.json"]
