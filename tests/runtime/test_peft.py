"""PEFT adapters on top of sparse linears: placed by them, trained through them, saved alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import hf_adaptive_sparse as has
from hf_adaptive_sparse.checkpoint.headers import CheckpointError
from hf_adaptive_sparse.checkpoint.plugin import apply_config
from hf_adaptive_sparse.runtime.conversion import sparse_linears
from hf_adaptive_sparse.runtime.weight_view import FrozenWeightError

peft = pytest.importorskip("peft", reason="adapters are tested where peft is installed")

Batches = list[dict[str, torch.Tensor]]
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(params=[16, 8])
def folder(request: pytest.FixtureRequest, tiny_llama: LlamaForCausalLM, tmp_path: Path) -> Path:
    config = has.SparsityConfig(metric="magnitude", weight_bits=request.param)
    apply_config(tiny_llama, config, progress=False)
    tiny_llama.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path, runtime: str, **options: object) -> LlamaForCausalLM:
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(
        folder, sparsity_config=has.SparsityConfig(runtime=runtime), **options
    )
    return model


def adapted(model: LlamaForCausalLM, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=TARGETS, lora_alpha=8, init_lora_weights=False, **options
    )
    return peft.get_peft_model(model, config)


def test_gradients_are_those_of_an_adapter_on_dense_weights(
    folder: Path, text_batches: Batches
) -> None:
    gradients = []
    for runtime in ("sparse", "dense"):
        model = adapted(load(folder, runtime))
        batch = text_batches[0]
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append(
            {n: p.grad for n, p in model.named_parameters() if p.grad is not None and "lora" in n}
        )
    sparse, dense = gradients
    assert len(sparse) == 4 * 3 * 2
    assert sparse.keys() == dense.keys()
    for name, gradient in sparse.items():
        torch.testing.assert_close(gradient, dense[name], rtol=1e-3, atol=1e-5)


def test_only_the_adapter_learns(folder: Path, text_batches: Batches) -> None:
    model = adapted(load(folder, "sparse"))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    losses = []
    for _ in range(3):
        batch = text_batches[0]
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora" not in name), name


def test_adapters_take_the_weights_dtype_and_gradient_checkpointing_works(
    folder: Path, text_batches: Batches
) -> None:
    base = load(folder, "sparse", dtype=torch.bfloat16)
    model = adapted(base, bias="none")
    adapter = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    assert adapter.device == base.device
    base.gradient_checkpointing_enable()
    base.enable_input_require_grads()
    model.train()
    batch = text_batches[0]
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora" in n)


def test_the_adapter_is_saved_alone_and_loads_on_both_runtimes(
    folder: Path, text_batches: Batches, tmp_path: Path
) -> None:
    model = adapted(load(folder, "sparse")).eval()
    expected = model(**text_batches[1]).logits
    model.save_pretrained(tmp_path / "adapter")
    size = sum(f.stat().st_size for f in (tmp_path / "adapter").glob("*.safetensors"))
    assert size < 200_000
    for runtime in ("sparse", "dense"):
        again = peft.PeftModel.from_pretrained(load(folder, runtime), tmp_path / "adapter").eval()
        logits = again(**text_batches[1]).logits
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    # transformers' own way to the same adapter.
    own = load(folder, "sparse")
    own.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(own(**text_batches[1]).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_merging_into_the_sparse_weight_is_refused(
    folder: Path, text_batches: Batches, use_dora: bool, safe_merge: bool
) -> None:
    model = adapted(load(folder, "sparse"), use_dora=use_dora)
    with pytest.raises(FrozenWeightError, match=r"runtime='dense'"):
        model.merge_and_unload(safe_merge=safe_merge)
    assert len(sparse_linears(model)) == 28
    dense = adapted(load(folder, "dense"), use_dora=use_dora).eval()
    expected = dense(**text_batches[0]).logits
    merged = dense.merge_and_unload(safe_merge=safe_merge)
    assert isinstance(merged, LlamaForCausalLM)
    torch.testing.assert_close(merged(**text_batches[0]).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (peft.AdaLoraConfig, {"init_r": 4, "total_step": 10, "init_lora_weights": False}),
        (peft.IA3Config, {"feedforward_modules": [], "init_ia3_weights": False}),
        (peft.LoHaConfig, {"r": 4, "init_weights": False}),
    ],
)
def test_other_adapters_are_not_lost_in_merging_either(
    folder: Path, method: type[peft.PeftConfig], options: dict[str, object]
) -> None:
    config = method(target_modules=TARGETS, **options)
    model = peft.get_peft_model(load(folder, "sparse"), config)
    with pytest.raises(FrozenWeightError, match=r"runtime='dense'"):
        model.merge_and_unload(safe_merge=True)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_starts_by_changing_the_weight_is_refused(folder: Path, start: str) -> None:
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=start)
    with pytest.raises(FrozenWeightError, match=r"runtime='dense'"):
        peft.get_peft_model(load(folder, "sparse"), config)
    peft.get_peft_model(load(folder, "dense"), config)


@pytest.mark.parametrize("runtime", ["dense", "sparse"])
def test_saving_the_wrapped_model_itself_says_what_to_save_instead(
    folder: Path, tmp_path: Path, runtime: str
) -> None:
    base = load(folder, runtime)
    model = adapted(base)
    with pytest.raises(CheckpointError, match=r"PEFT adapter .*merge_and_unload\(\)"):
        base.save_pretrained(tmp_path / "out")
    model.unload().save_pretrained(tmp_path / "out")


def test_a_model_with_an_adapter_is_not_pruned(
    tiny_llama: LlamaForCausalLM, text_batches: Batches, tmp_path: Path
) -> None:
    model = adapted(tiny_llama)
    base = model.get_base_model()
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = has.SparsityConfig(metric="magnitude")
    with pytest.raises(TypeError, match=r"got PeftModel.* merge_and_unload\(\)"):
        has.prune(model, config)
    with pytest.raises(ValueError, match=r"no adapters .* merge_and_unload\(\)"):
        has.prune(base, config)
    with pytest.raises(ValueError, match=r"no adapters .* merge_and_unload\(\)"):
        has.search(model, text_batches, text_batches, progress=False)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.state_dict().items())

    merged = model.merge_and_unload()
    has.prune(merged, config, progress=False)
    merged.save_pretrained(tmp_path / "out")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(loaded(**text_batches[0]).logits, merged(**text_batches[0]).logits)


def test_reports_count_no_weights_of_adapters(folder: Path) -> None:
    base = load(folder, "dense")
    expected = has.sparsity_report(base).total
    adapted(base)
    found = has.sparsity_report(base).total
    assert (found.numel, found.ratio) == (expected.numel, expected.ratio)


@pytest.mark.parametrize("folder", [8], indirect=True)
def test_a_merged_adapter_is_saved_without_loss(
    folder: Path, text_batches: Batches, tmp_path: Path
) -> None:
    merged = adapted(load(folder, "dense")).merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "merged")
    # The sparse runtime multiplies codes by activations on 15 bits.
    for runtime, close in (("dense", 1e-5), ("sparse", 1e-4)):
        loaded = load(tmp_path / "merged", runtime)
        expected = merged(**text_batches[0]).logits
        found = loaded(**text_batches[0]).logits
        torch.testing.assert_close(found, expected, rtol=10 * close, atol=close)
