"""Experts that stay compressed in memory: the same model as with plain ones, in less of it."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from transformers import PreTrainedModel

import hf_adaptive_sparse as has
from hf_adaptive_sparse.checkpoint.plugin import apply_config
from hf_adaptive_sparse.kernels import sparse_linear
from hf_adaptive_sparse.runtime.conversion import decompress_
from hf_adaptive_sparse.runtime.parameters import FrozenParameter
from hf_adaptive_sparse.runtime.sparse_experts import ExpertView, SparseStack, sparse_stacks
from hf_adaptive_sparse.runtime.weight_view import FrozenWeightError
from tests.families.catalogue import GROUPS, OMNI
from tests.families.tiny_models import tiny_model

FAMILIES = ["mixtral", "qwen3_moe", "qwen3_vl_moe", "glm4_moe", "olmoe", "phimoe"]
# Qwen3-Omni's initialisation would fill experts with random numbers that are loaded already.
FAMILIES.append("qwen3_omni_moe_thinker")
FIELDS = {"glm4_moe": GROUPS, "qwen3_omni_moe_thinker": OMNI}
IDS = torch.arange(24).view(2, 12) % 60 + 3


def saved(
    folder: Path, model_type: str = "mixtral", dtype: torch.dtype | None = None, **fields: object
) -> PreTrainedModel:
    model = tiny_model(model_type, FIELDS.get(model_type, {})).to(dtype)
    apply_config(model, has.SparsityConfig(metric="magnitude", **fields), progress=False)
    model.save_pretrained(folder)
    return model


def loaded(folder: Path, model: PreTrainedModel, runtime: str = "sparse") -> PreTrainedModel:
    config = has.SparsityConfig(runtime=runtime)
    return type(model).from_pretrained(folder, sparsity_config=config).eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_logits_are_those_of_plain_experts(model_type, bits, tmp_path):
    model = saved(tmp_path, model_type, weight_bits=bits)
    dense, sparse = loaded(tmp_path, model, "dense"), loaded(tmp_path, model)
    assert sparse_stacks(sparse)
    assert not sparse_stacks(dense)
    torch.testing.assert_close(logits(sparse), logits(dense), rtol=2e-3, atol=2e-3)
    tokens = dense.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(sparse.generate(input_ids=IDS, max_new_tokens=4, do_sample=False), tokens)


def test_no_dense_matrix_is_made(tmp_path, monkeypatch):
    model = saved(tmp_path)
    sparse = loaded(tmp_path, model)
    seen = []
    monkeypatch.setattr(
        sparse_linear,
        "linear",
        lambda x, weight, bias, real=sparse_linear.linear: (
            seen.append(weight.shape) or real(x, weight, bias)
        ),
    )
    monkeypatch.setattr(ExpertView, "__torch_dispatch__", None)
    logits(sparse)
    stack = sparse.model.layers[0].mlp.experts.gate_up_proj
    assert isinstance(stack, SparseStack)
    assert tuple(stack.shape[1:]) in seen


def test_memory_is_what_the_compressed_tensors_take(tmp_path):
    model = saved(tmp_path, "qwen3_moe")
    sparse = loaded(tmp_path, model)
    names = [name for name, _ in sparse.named_parameters()]
    assert not [name for name in names if name.endswith(("gate_up_proj", "down_proj"))]
    assert sparse.get_memory_footprint() < model.get_memory_footprint()
    report = has.sparsity_report(sparse)
    dense = has.sparsity_report(loaded(tmp_path, model, "dense"))
    assert [w.name for w in report.modules] == [w.name for w in dense.modules]
    assert report.mean_sparsity == dense.mean_sparsity
    stacks = sparse_stacks(sparse)
    by_name = {w.name: w for w in report.modules}
    assert stacks.keys() <= by_name.keys()
    for name, stack in stacks.items():
        held = [*stack.parts.values(), stack.row_offsets]
        assert by_name[name].memory_bytes == sum(tensor.nbytes for tensor in held)
        assert by_name[name].stored_bytes == sum(part.nbytes for part in stack.parts.values())


@pytest.mark.parametrize("bits", [16, 4])
def test_saves_what_it_was_loaded_from(bits, tmp_path):
    model = saved(tmp_path / "first", "qwen3_vl_moe", weight_bits=bits)
    loaded(tmp_path / "first", model).save_pretrained(tmp_path / "again")
    first, again = (tmp_path / f / "model.safetensors" for f in ("first", "again"))
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "dequantize"])
def test_copies_and_plain_models_compute_the_same(how, tmp_path):
    model = saved(tmp_path)
    sparse = loaded(tmp_path, model)
    expected = logits(sparse)
    other = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda m: pickle.loads(pickle.dumps(m)),
        "dequantize": lambda m: copy.deepcopy(m).dequantize(),
    }[how](sparse)
    torch.testing.assert_close(logits(other), expected, rtol=2e-3, atol=2e-3)
    if how == "dequantize":
        implementation = loaded(tmp_path, model, "dense").config._experts_implementation
        assert other.config._experts_implementation == implementation
        weights = other.state_dict()
        name = "model.layers.0.mlp.experts.down_proj"
        assert torch.equal(weights[name], model.state_dict()[name])
    else:  # of tensors of their own
        own = {p.data_ptr() for p in sparse.parameters()}
        assert not own & {p.data_ptr() for p in other.parameters()}
        stack = other.model.layers[0].mlp.experts.gate_up_proj
        assert stack.owner is other.model.layers[0].mlp.experts


def test_experts_of_12_bits(tmp_path):
    model = saved(tmp_path / "a", dtype=torch.bfloat16, weight_bits=12)
    dense, sparse = loaded(tmp_path / "a", model, "dense"), loaded(tmp_path / "a", model)
    stack = sparse.model.layers[0].mlp.experts.gate_up_proj
    assert (stack.weight.bits, stack.dtype) == (12, torch.bfloat16)
    assert torch.equal(stack.to_dense(), dense.model.layers[0].mlp.experts.gate_up_proj)
    torch.testing.assert_close(logits(sparse), logits(dense), rtol=0.05, atol=0.05)
    sparse.save_pretrained(tmp_path / "b")
    first, again = (tmp_path / f / "model.safetensors" for f in "ab")
    assert first.read_bytes() == again.read_bytes()
    twin = copy.deepcopy(sparse)
    assert torch.equal(logits(twin), logits(sparse))
    config = has.SparsityConfig(runtime="sparse")
    wide = type(model).from_pretrained(tmp_path / "a", sparsity_config=config, dtype=torch.float32)
    stack = wide.model.layers[0].mlp.experts.gate_up_proj
    assert (stack.weight.bits, stack.dtype) == (16, torch.float32)
    assert logits(wide).isfinite().all()


def test_experts_run_one_by_one_while_any_of_them_is_compressed(tmp_path):
    whole = {"model.layers.0": 0.0, "model.layers.1": 0.5}
    model = saved(tmp_path, dtype=torch.bfloat16, sparsity=whole, weight_bits=12)
    dense, sparse = (
        type(model).from_pretrained(
            tmp_path, sparsity_config=has.SparsityConfig(runtime=runtime), dtype=torch.float32
        )
        for runtime in ("dense", "sparse")
    )
    before = dense.config._experts_implementation
    first, second = (layer.mlp.experts for layer in sparse.model.layers[:2])
    assert isinstance(first.down_proj, torch.nn.Parameter)  # nothing is removed from it
    assert isinstance(second.down_proj, SparseStack)
    torch.testing.assert_close(logits(sparse), logits(dense), rtol=2e-3, atol=2e-3)
    for name in list(sparse_stacks(sparse)):
        assert sparse.config._experts_implementation != before
        decompress_(sparse, [name])
        torch.testing.assert_close(logits(sparse), logits(dense), rtol=2e-3, atol=2e-3)
    assert sparse.config._experts_implementation == before


def test_another_dtype(tmp_path):
    model = saved(tmp_path, weight_bits=8)
    sparse = loaded(tmp_path, model)
    logits(sparse)  # what is kept of the first dtype must not be used in the second
    sparse.to(torch.bfloat16)
    assert sparse.model.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16
    assert logits(sparse).isfinite().all()


@pytest.mark.parametrize("bits", [16, 12, 8, 4])
def test_a_type_is_that_of_the_weights_and_not_of_their_bitmasks(bits, tmp_path):
    model = saved(tmp_path / "a", dtype=torch.bfloat16, weight_bits=bits)
    sparse, twin = (loaded(tmp_path / "a", model) for _ in range(2))
    sparse, twin = sparse.type(torch.float16), twin.to(torch.float16)
    expected = twin.state_dict()
    assert all(torch.equal(tensor, expected[n]) for n, tensor in sparse.state_dict().items())
    assert torch.equal(logits(sparse), logits(twin))
    if bits == 12:  # those of bfloat16, and saved as no others
        return
    for each, folder in ((sparse, "b"), (twin, "c")):
        each.save_pretrained(tmp_path / folder)
    written, other = (tmp_path / f / "model.safetensors" for f in "bc")
    assert written.read_bytes() == other.read_bytes()
    assert logits(loaded(tmp_path / "b", model)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_experts_of_12_bits_become_plain_when_cast(dtype, tmp_path):
    model = saved(tmp_path, dtype=torch.bfloat16, weight_bits=12)
    sparse, dense = loaded(tmp_path, model), loaded(tmp_path, model, "dense").to(dtype)
    logits(sparse)
    assert sparse.to(torch.bfloat16).model.layers[0].mlp.experts.down_proj.bits == 12
    twin = pickle.loads(pickle.dumps(copy.deepcopy(sparse))).to(dtype)
    stack = twin.model.layers[0].mlp.experts.down_proj
    assert (stack.bits, stack.dtype, stack.parts["values"].dtype) == (16, dtype, dtype)
    assert sparse.model.layers[0].mlp.experts.down_proj.bits == 12
    assert torch.equal(stack.to_dense(), dense.model.layers[0].mlp.experts.down_proj)
    torch.testing.assert_close(logits(twin), logits(dense), rtol=2e-3, atol=2e-3)


def test_a_dtype_without_kernels_is_refused(tmp_path):
    sparse = loaded(tmp_path, saved(tmp_path))
    with pytest.raises(ValueError, match=r"got torch.float64.*runtime='dense'"):
        sparse.model.layers[0].mlp.experts.double()


@functools.cache
def pruned(seed: int, ratio: float, bits: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = tiny_model("mixtral").to(torch.bfloat16 if bits == 12 else None)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    fields = {"target_sparsity": ratio, "weight_bits": bits, "runtime": "sparse"}
    apply_config(model, has.SparsityConfig(metric="magnitude", **fields), progress=False)
    return model.eval()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("ratio", [0.5, 0.3])
@pytest.mark.parametrize("bits", [16, 12, 8, 4])
def test_state_dicts_load_whatever_their_mask(bits, ratio, assign):
    model, other = copy.deepcopy(pruned(1, 0.5, bits)), pruned(2, ratio, bits)
    logits(model)  # what is kept of the first weights must not be used with the second
    model.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(logits(model), logits(other))
    stacks, others = sparse_stacks(model), sparse_stacks(other)
    assert stacks
    for name, stack in stacks.items():
        assert torch.equal(stack.row_offsets, others[name].row_offsets)
        assert all(isinstance(part, FrozenParameter) for part in stack.parts.values())


@pytest.mark.parametrize("how", ["functional", "data", "copy"])
@pytest.mark.parametrize("bits", [16, 8])
def test_other_masks_in_the_parameters_place_are_counted(bits, how):
    """All keep the same number of weights."""
    model, other = copy.deepcopy(pruned(1, 0.5, bits)), pruned(2, 0.5, bits)
    own, wanted = logits(model), logits(other)
    parts = {name: parameter.detach().clone() for name, parameter in other.named_parameters()}
    if how == "functional":
        with torch.no_grad():
            found = torch.func.functional_call(model, parts, kwargs={"input_ids": IDS}).logits
        assert torch.equal(logits(model), own)
    else:
        for name, parameter in model.named_parameters():
            if how == "data":
                parameter.data = parts[name]
            else:
                with torch.no_grad():
                    parameter.copy_(parts[name])
        found = logits(model)
    assert torch.equal(found, wanted)


def test_state_dicts_that_do_not_fit_are_refused_and_change_nothing():
    model = pruned(1, 0.5, 16)
    before = logits(model)
    prefix = "model.layers.0.mlp.experts.sparse_down_proj_"
    state = {n: t for n, t in pruned(2, 0.3, 16).state_dict().items() if ".experts." in n}
    values, bitmask = state[prefix + "values"], state[prefix + "bitmask"]
    for damaged, what in (
        ({prefix + "values": values[1:]}, r"keeps .* weights but .* the two must agree"),
        ({prefix + "values": values.to(torch.int8)}, "need scales"),
        (
            {prefix + "bitmask": bitmask.flatten(0, 1)},
            r"a bitmask tensor of shape \(\d+, \d+, \d+\)",
        ),
    ):
        first = {n: t for n, t in state.items() if ".layers.0." in n}
        with pytest.raises(RuntimeError, match=what):
            model.load_state_dict(first | damaged, strict=False)
        assert torch.equal(logits(model), before)
    with pytest.raises(RuntimeError, match=r"Missing key.*sparse_down_proj_codebook"):
        twelve = pruned(1, 0.5, 12)
        state = {n: t for n, t in twelve.state_dict().items() if not n.endswith("codebook")}
        twelve.load_state_dict(state)


def test_compressed_in_memory_where_the_files_are_dense(tmp_path):
    model = saved(tmp_path)
    twin = tiny_model("mixtral")
    twin.load_state_dict(model.state_dict())
    config = has.SparsityConfig(metric="magnitude", runtime="sparse", target_sparsity=0.5)
    apply_config(twin, config, progress=False)
    assert sparse_stacks(twin)
    torch.testing.assert_close(logits(twin), logits(model), rtol=2e-3, atol=2e-3)


def test_gradients_flow_through_and_not_into_experts(tmp_path):
    model = saved(tmp_path)
    sparse, dense = loaded(tmp_path, model), loaded(tmp_path, model, "dense")
    found = []
    for each in (sparse, dense):
        embeds = each.get_input_embeddings()(IDS).detach().requires_grad_()
        each(inputs_embeds=embeds).logits.square().mean().backward()
        found.append(embeds.grad)
    torch.testing.assert_close(*found, rtol=5e-3, atol=1e-5)
    values = sparse.model.layers[0].mlp.experts.sparse_down_proj_values
    assert values.grad is None
    with pytest.raises(FrozenWeightError):
        values.requires_grad_()


def test_other_weights_in_place_of_compressed_ones_are_refused(tmp_path):
    sparse = loaded(tmp_path, saved(tmp_path))
    experts, before = sparse.model.layers[0].mlp.experts, logits(sparse)
    dense = experts.down_proj.to_dense()
    attempts = (
        lambda: setattr(experts.down_proj, "data", dense),
        lambda: setattr(experts.down_proj[0], "data", dense[0]),
        lambda: setattr(experts, "down_proj", torch.nn.Parameter(dense)),
    )
    for attempt in attempts:
        with pytest.raises(FrozenWeightError, match=r"runtime='dense'"):
            attempt()
        assert isinstance(experts.down_proj, SparseStack)
        assert torch.equal(logits(sparse), before)
    decompress_(sparse)
    experts.down_proj = torch.nn.Parameter(dense)  # a plain one again, which takes any other


def test_more_than_one_expert_at_a_time_is_refused(tmp_path):
    model = saved(tmp_path)
    stack = loaded(tmp_path, model).model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(stack[1].clone(), stack.to_dense()[1])
    assert stack[torch.tensor(1)].shape == stack.shape[1:]
    for several in (slice(None), torch.tensor([0, 1]), (0, 1)):
        with pytest.raises(TypeError, match="give one matrix at a time"):
            stack[several]
    assert len(stack) == len(stack.to_dense())
    with pytest.raises(IndexError):
        stack[len(stack)]


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_another_experts_implementation_is_told_what_to_do(implementation, tmp_path):
    sparse = loaded(tmp_path, saved(tmp_path))
    sparse.set_experts_implementation(implementation)
    with pytest.raises((TypeError, AttributeError), match="experts implementation 'eager'"):
        logits(sparse)


def test_a_model_with_compressed_experts_is_not_pruned_again(tmp_path):
    model = saved(tmp_path)
    with pytest.raises(ValueError, match="compressed in memory"):
        has.prune(loaded(tmp_path, model), has.SparsityConfig(metric="magnitude"))


def test_transposed_experts_are_decompressed(tmp_path, caplog):
    model = saved(tmp_path, "gpt_oss")
    with caplog.at_level("WARNING", logger="hf_adaptive_sparse"):
        loaded(tmp_path, model, "dense")
        assert "no kernel" not in caplog.text
        sparse = loaded(tmp_path, model)
    assert "no kernel for the layout of this model's experts" in caplog.text
    assert f"; {2 * model.config.num_hidden_layers} of their weights" in caplog.text
    assert not sparse_stacks(sparse)
    torch.testing.assert_close(logits(sparse), logits(model), rtol=2e-3, atol=2e-3)


def test_experts_that_accelerate_keeps_elsewhere(tmp_path):
    model = saved(tmp_path)
    sparse = loaded(tmp_path, model)
    expected = logits(sparse)
    cpu_offload(sparse, execution_device=torch.device("cpu"))
    assert sparse.model.layers[0].mlp.experts.sparse_down_proj_values.is_meta
    for _ in range(2):
        assert torch.equal(logits(sparse), expected)
    assert sparse.model.layers[0].mlp.experts.down_proj._weight is None


def test_experts_may_stay_on_disk(tmp_path):
    model = saved(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {"lm_head": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    sparse = type(model).from_pretrained(
        tmp_path / "model",
        sparsity_config=has.SparsityConfig(runtime="sparse"),
        device_map=device_map,
        offload_folder=str(tmp_path / "offloaded"),
    )
    assert sparse.model.layers[0].mlp.experts.sparse_down_proj_values.is_meta
    torch.testing.assert_close(logits(sparse), logits(model), rtol=2e-3, atol=2e-3)


def test_compiled_around_experts(tmp_path):
    model = saved(tmp_path)
    sparse = loaded(tmp_path, model)
    expected = logits(sparse)
    compiled = torch.compile(sparse, backend="eager")
    torch.testing.assert_close(logits(compiled), expected)
