"""The main job and the sparse runtime on a CUDA device, end to end. They need a GPU."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hf_adaptive_sparse as has
from hf_adaptive_sparse.cli import main
from hf_adaptive_sparse.kernels import triton_attention, triton_sparse
from hf_adaptive_sparse.runtime.conversion import sparse_linears
from tests.conftest import random_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SETTINGS = {"max_new_tokens": 160, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def pruned(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> Path:
    has.prune(tiny_llama, has.SparsityConfig(metric="magnitude", kv_cache=8), progress=False)
    tiny_llama.save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned"


def load(folder: Path, runtime: str, device: str = "cuda") -> LlamaForCausalLM:
    model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(
        folder, sparsity_config=has.SparsityConfig(runtime=runtime), device_map=device
    )
    return model


@pytest.mark.parametrize("metric", ["lognorm", "wanda", "ria", "sparsegpt"])
def test_prunes_as_on_the_cpu(tiny_llama: LlamaForCausalLM, metric: str) -> None:
    batches = [{"input_ids": random_ids(8, 64)}]
    masks = []
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(tiny_llama).to(device)
        report = has.prune(model, has.SparsityConfig(metric=metric), batches, progress=False)
        assert report.mean_sparsity == pytest.approx(0.5, abs=1e-4)
        linears = [m.weight for n, m in model.named_modules() if n.endswith("_proj")]
        assert all(weight.device.type == device for weight in linears)
        masks.append(torch.cat([(weight != 0).flatten().cpu() for weight in linears]))
    # Sums in another order tip a few weights whose scores are all but equal.
    assert (masks[0] == masks[1]).float().mean() > 0.97


def test_both_runtimes_generate_the_same(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, sparse, on_cpu = (
        load(pruned, "dense"),
        load(pruned, "sparse"),
        load(pruned, "dense", "cpu"),
    )
    assert len(sparse_linears(sparse)) == 28
    assert sparse.get_memory_footprint() < dense.get_memory_footprint()
    ids = random_ids(2, 40)
    expected = on_cpu(ids).logits
    for model in (dense, sparse):
        found = model(ids.cuda()).logits.cpu()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    calls = []
    for module, name in ((triton_sparse, "linear"), (triton_attention, "compute")):
        kernel = getattr(module, name)

        def counted(*args, kernel=kernel, name=name, **kwargs):
            calls.append(name)
            return kernel(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    found = sparse.generate(ids.cuda(), **SETTINGS).cpu()
    assert set(calls) == {"linear", "compute"}
    expected = on_cpu.generate(ids, **SETTINGS)
    # A random model's tokens are close calls: once two runs part they stay apart.
    assert torch.equal(found[:, :60], expected[:, :60])


def test_12_bits_become_plain_and_are_saved_in_12_again(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    config = has.SparsityConfig(metric="magnitude", weight_bits=12)
    has.prune(tiny_llama.bfloat16(), config, progress=False)
    tiny_llama.save_pretrained(tmp_path / "a")
    ids = random_ids(2, 30)
    expected = load(tmp_path / "a", "dense", "cpu")(ids).logits
    for model in (load(tmp_path / "a", "sparse"), load(tmp_path / "a", "sparse", "cpu").cuda()):
        held = sparse_linears(model).values()
        assert {(m.bits, m.weight_values.device.type) for m in held} == {(16, "cuda")}
        torch.testing.assert_close(model(ids.cuda()).logits.cpu(), expected, atol=0.05, rtol=0.05)
        model.save_pretrained(tmp_path / "b")
        files = [tmp_path / folder / "model.safetensors" for folder in "ab"]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_gradients_go_through_sparse_weights(pruned: Path) -> None:
    gradients = []
    for device in ("cpu", "cuda"):
        model = load(pruned, "sparse", device)
        states = (
            model.get_input_embeddings()(random_ids(2, 70).to(device)).detach().requires_grad_()
        )
        model(inputs_embeds=states, use_cache=False).logits.square().mean().backward()
        gradients.append(states.grad.cpu())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


def test_a_compiled_model_decodes_the_same(pruned: Path) -> None:
    model = load(pruned, "sparse")
    ids = random_ids(1, 150).cuda()
    outputs = []
    for forward in (model, torch.compile(model)):
        cache = has.AdaptiveQuantizedCache(model.config, has.KVCacheConfig(bits=8))
        with torch.no_grad():
            forward(ids, cache=cache)
            outputs.append([forward(ids[:, :1], cache=cache).logits for _ in range(3)])
    for found, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_search_leaves_the_model_as_it_was(tiny_llama: LlamaForCausalLM) -> None:
    model = tiny_llama.cuda()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = [{"input_ids": random_ids(4, 64)} for _ in range(2)]
    space = has.SearchSpace(blocks=2, kv_mean_bits=7.0)
    result = has.search(model, data, data, space, n_trials=5, progress=False)
    assert result.best_config.kv_cache is not None
    assert math.isfinite(result.best_value)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_compress_takes_the_gpu_by_itself(
    llava_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    torch.cuda.reset_peak_memory_stats()
    data = ["--calibration-samples", "8", "--evaluation-samples", "8", "--sequence-length", "32"]
    out = tmp_path / "out"
    arguments = ["compress", str(llava_folder), "--output", str(out), "--trials", "3"]
    arguments += ["--calibration", str(text_file), "--evaluation", str(text_file), *data]
    assert main(arguments) == 0
    assert torch.cuda.max_memory_allocated() > 0
    model = has.AutoModelForVision2Seq.from_pretrained(out, device_map="cuda")
    assert has.sparsity_report(model).mean_sparsity == pytest.approx(0.5, abs=1e-3)
    assert model.generate(random_ids(1, 5).cuda(), **SETTINGS).shape == (1, 165)
