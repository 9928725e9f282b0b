"""`SparseLinear` against the `nn.Linear` it stands for."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from hf_adaptive_sparse.kernels import sparse_linear
from hf_adaptive_sparse.kernels.library import library
from hf_adaptive_sparse.packing.bitmask import BitmaskError
from hf_adaptive_sparse.packing.offsets import count_block_offsets
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight
from hf_adaptive_sparse.packing.stored_weight import ValueFormat
from hf_adaptive_sparse.runtime import operator
from hf_adaptive_sparse.runtime.conversion import compress_, decompress_, sparse_linears
from hf_adaptive_sparse.runtime.parameters import FrozenParameter
from hf_adaptive_sparse.runtime.sparse_linear import SparseLinear
from hf_adaptive_sparse.runtime.weight_view import FrozenWeightError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = (16, 8, 4)


def pruned(rows: int = 24, columns: int = 77, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A linear that lost half its weights, a whole row among them."""
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows)
    with torch.no_grad():
        linear.weight[torch.rand(rows, columns) < 0.5] = 0.0
        linear.weight[3] = 0.0
    return linear.to(dtype)


def sparse(linear: nn.Linear, bits: int = 16, group_size: int | None = None) -> SparseLinear:
    weight = SparseWeight.from_dense(linear.weight.detach(), bits, group_size)
    return SparseLinear.from_weight(weight, linear.bias)


def tolerance(dtype: torch.dtype, bits: int = 16) -> dict[str, float]:
    """Codes are multiplied by x on 15 bits."""
    eps = max(torch.finfo(dtype).eps, 2**-12 if bits <= 8 else 0)
    return {"rtol": 4 * eps, "atol": 4 * eps}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(77,), (3, 77), (2, 5, 77), (0, 77)])
def test_forward_is_that_of_the_decompressed_linear(
    dtype: torch.dtype, bits: int, shape: tuple[int, ...]
) -> None:
    module = sparse(pruned(dtype=dtype), bits)
    x = torch.randn(shape).to(dtype)
    expected = module.to_linear()(x)
    torch.testing.assert_close(module(x), expected, **tolerance(dtype, bits))
    assert module(x).shape == (*shape[:-1], 24)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_flow_through_to_input_and_bias(bits: int, with_bias: bool) -> None:
    linear = pruned()
    if not with_bias:
        linear.bias = None
    module = sparse(linear, bits)
    plain = copy.deepcopy(module.to_linear())
    x = torch.randn(2, 3, 77, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    module(x).square().sum().backward()
    plain(twin).square().sum().backward()
    close = tolerance(torch.float32, bits)
    torch.testing.assert_close(x.grad, twin.grad, **close)
    if with_bias:
        torch.testing.assert_close(module.bias.grad, plain.bias.grad, **close)
    assert module.weight_values.grad is None


@pytest.mark.parametrize("tokens", [3, 200])
def test_second_derivatives_and_jacobians_are_those_of_dense(tokens: int) -> None:
    module = sparse(pruned())
    plain = module.to_linear()
    before, x = nn.Linear(77, 77), torch.randn(tokens, 77)
    found = []
    for linear in (module, plain):
        product = linear(before(x)).pow(3).sum()
        first = torch.autograd.grad(product, (before.weight, linear.bias), create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        found.append(torch.autograd.grad(penalty, (before.weight, linear.bias)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2)
    row = x[:2].clone()
    for vectorize in (False, True):
        jacobian = torch.autograd.functional.jacobian(module, row, vectorize=vectorize)
        expected = torch.autograd.functional.jacobian(plain, row)
        torch.testing.assert_close(jacobian, expected)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("tokens", [4, 100])
def test_torchs_function_transforms_see_a_dense_product(tokens: int, bits: int) -> None:
    module = sparse(pruned(), bits)
    plain = module.to_linear()
    x, direction = torch.randn(2, tokens, 77)
    bias = module.bias.detach()

    def loss(linear: nn.Linear) -> Callable[..., torch.Tensor]:
        call = torch.func.functional_call
        return lambda given, row: call(linear, {"bias": given}, (row,)).pow(3).sum()

    for transform in (
        lambda f: torch.func.jvp(f, (x,), (direction,)),
        lambda f: torch.func.jacrev(f)(x[0]),
        lambda f: torch.func.jacfwd(f)(x[0]),
        lambda f: torch.func.hessian(lambda row: f(row).pow(2).sum())(x[0]),
        lambda f: torch.func.grad(loss(f), argnums=(0, 1))(bias, x),
        lambda f: torch.vmap(torch.func.grad(loss(f)), in_dims=(None, 0))(bias, x),
        lambda f: torch.func.grad(lambda rows: torch.vmap(f)(rows).sum())(x),
    ):
        torch.testing.assert_close(transform(module), transform(plain), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("tokens", [4, 100])
def test_tangents_flow_through(tokens: int, grad: bool) -> None:
    module, x = sparse(pruned()), torch.randn(tokens, 77)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        found = forward_ad.unpack_dual(module(forward_ad.make_dual(x, 2 * x))).tangent
    torch.testing.assert_close(found, 2 * x @ module.to_dense().T)


@pytest.mark.skipif(library() is None, reason="there is no native library")
@pytest.mark.parametrize("bits", [16, 12, 8, 4])
@pytest.mark.parametrize("tokens", [1, 100])
def test_fewer_values_than_the_offsets_promise_are_not_read(bits: int, tokens: int) -> None:
    linear = sparse(pruned(dtype=torch.bfloat16), bits)
    linear.weight_values.data = linear.weight_values.data[:5]
    x = torch.ones(tokens, linear.in_features, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="tensors not of one weight"):
        linear(x)


@pytest.mark.parametrize("name", ["weight_values", "weight_bitmask", "weight_scales"])
def test_a_gradient_of_an_overwritten_weight_is_refused(name: str) -> None:
    module = sparse(pruned(), 8)
    x = torch.randn(3, 77, requires_grad=True)
    product = module(x).sum()
    part = getattr(module, name)
    with torch.no_grad():
        part.copy_(part.clone())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    bias_only = module(x.detach()).sum()
    with torch.no_grad():
        part.copy_(part.clone())
    bias_only.backward()
    assert torch.equal(module.bias.grad, torch.full((24,), 3.0))


@pytest.mark.parametrize("shape", [(77,), (3, 77), (2, 100, 77)])
def test_a_product_is_changed_in_place_as_a_dense_one(shape: tuple[int, ...]) -> None:
    module = sparse(pruned())
    plain = module.to_linear()
    x = torch.randn(shape, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    nn.functional.relu(module(x), inplace=True).sum().backward()
    ours, module.bias.grad = module.bias.grad, None
    nn.functional.relu(plain(twin), inplace=True).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(ours, plain.bias.grad)


def test_the_operators_pass_torchs_own_checks() -> None:
    module = sparse(pruned())
    weight = module.sparse_weight
    x = torch.randn(3, 77, requires_grad=True)
    for bias in (module.bias.detach().requires_grad_(), None):
        arguments = (
            x,
            bias,
            weight.values.detach(),
            weight.bitmask.detach(),
            weight.row_offsets,
            None,
            None,
            None,
            77,
            0,
        )
        torch.library.opcheck(torch.ops.hf_adaptive_sparse.linear.default, arguments)


def test_the_size_is_counted(tmp_path: Path) -> None:
    module = sparse(pruned(dtype=torch.bfloat16))
    held = sum(p.nbytes for p in module.parameters()) + sum(b.nbytes for b in module.buffers())
    assert held == module.memory_bytes + module.bias.nbytes
    assert module.memory_bytes == module.sparse_weight.nbytes


def test_block_offsets_come_and_go_with_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs have them; here the CPU pretends to."""
    module = sparse(pruned())
    without = module.memory_bytes
    assert module.block_offsets is None

    def count(weight: SparseWeight) -> torch.Tensor:
        return count_block_offsets(weight.bitmask, weight.shape[1])

    monkeypatch.setattr(sparse_linear, "block_offsets_for", count)
    module.to("cpu")
    assert torch.equal(module.sparse_weight.block_offsets, count(module.sparse_weight))
    assert module.sparse_weight is module.sparse_weight
    assert {buffer.dtype for buffer in module.buffers()} <= {torch.uint8, torch.int32}  # for NCCL
    assert module.memory_bytes == without + module.block_offsets.nbytes
    assert module.memory_bytes == module.sparse_weight.nbytes
    assert "block_offsets" not in module.state_dict()
    module.block_offsets = None  # as if its parts were moved one by one
    assert module.sparse_weight.block_offsets is not None
    monkeypatch.setattr(sparse_linear, "block_offsets_for", lambda weight: None)
    module.to("cpu")
    assert module.memory_bytes == without


def test_nothing_of_an_offloaded_weight_is_kept() -> None:
    """accelerate moves the parameters in for one forward, and the buffers stay."""
    module = sparse(pruned())
    module.sparse_weight  # noqa: B018  # kept from here on
    assert module._over_parameters is not None
    module._over_parameters = None
    module._hf_hook = types.SimpleNamespace(offload=True)
    assert module.sparse_weight.shape == (module.out_features, module.in_features)
    assert module._over_parameters is None


@pytest.mark.parametrize("bits", [16, 12, 8, 4])
def test_replicas_of_data_parallel_multiply(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have copies of the parameters, as attributes, and of the buffers."""
    module = sparse(pruned(dtype=torch.bfloat16), bits)
    x = torch.randn(3, 77, dtype=torch.bfloat16)
    wanted = module(x)  # what it keeps goes to replicas, too
    monkeypatch.delattr(sparse_linear, "count_row_offsets")
    replica = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        if parameter is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, parameter.detach().clone())
    for name, buffer in module._buffers.items():
        replica._buffers[name] = None if buffer is None else buffer.clone()
    assert torch.equal(replica(x), wanted)
    assert replica._over_parameters is module._over_parameters


def test_training_the_weight_is_refused() -> None:
    module = sparse(pruned())
    attempts = (
        module.requires_grad_,
        lambda: module.weight.requires_grad_(),
        lambda: setattr(module.weight, "requires_grad", True),
        lambda: module.weight.data.add_(1.0),
        lambda: setattr(module.weight, "data", torch.zeros(24, 77)),
        lambda: setattr(module.weight.data, "data", torch.zeros(24, 77)),
        lambda: setattr(module, "weight", torch.zeros(24, 77)),
        lambda: setattr(module, "weight", nn.Parameter(torch.zeros(24, 77))),
        lambda: module.register_parameter("weight", None),
        lambda: nn.init.normal_(module.weight),
        module.reset_parameters,
        lambda: FrozenParameter(torch.zeros(2), requires_grad=True),
    )
    for attempt in attempts:
        with pytest.raises(FrozenWeightError, match=r"runtime='dense'.*adapter"):
            attempt()
    assert torch.equal(module.weight + 0, pruned().weight)
    module.weight_values = nn.Parameter(module.weight_values.data)
    with pytest.raises(FrozenWeightError, match=r"weight_values requires a gradient"):
        module(torch.zeros(77))
    module = sparse(pruned())
    module.requires_grad_(False)
    assert not any(p.requires_grad for p in module.parameters())


def test_the_view_looks_like_the_weight_and_computes_with_it() -> None:
    module = sparse(pruned(dtype=torch.bfloat16), 8)
    view, dense = module.weight, module.to_linear().weight
    assert (view.shape, view.dtype, view.device) == (dense.shape, dense.dtype, dense.device)
    assert view.is_floating_point()
    assert not view.requires_grad
    assert view.data.shape == dense.shape
    assert torch.equal(view + 0, dense)
    assert torch.equal(view.float(), dense.float())
    assert torch.equal(
        torch.linalg.norm(view.float(), dim=1), torch.linalg.norm(dense.float(), dim=1)
    )
    assert "shape=(24, 77)" in repr(view)


@pytest.mark.parametrize("bits", BITS)
def test_casts(bits: int) -> None:
    module = sparse(pruned(), bits)
    before = module.to_linear().weight
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        module.to(dtype)
        assert module.dtype == module.weight.dtype == module.bias.dtype == dtype
        assert module.weight_bitmask.dtype == torch.uint8
        assert module(torch.randn(2, 77).to(dtype)).dtype == dtype
        torch.testing.assert_close(module.to_linear().weight.float(), before, rtol=1e-2, atol=1e-3)
    with pytest.raises(ValueError, match=r"float16, got torch.float64.*Load it again"):
        module.double()
    assert module.dtype == torch.float32


@pytest.mark.parametrize("bits", [*BITS, 12])
@pytest.mark.parametrize("dtype", [torch.float16, "torch.HalfTensor"])
def test_a_type_is_that_of_the_weight_and_not_of_its_bitmask(bits, dtype) -> None:
    module = sparse(pruned(dtype=torch.bfloat16), bits)
    twin = copy.deepcopy(module).half()
    module.type(dtype)
    assert module.dtype == module.bias.dtype == torch.float16
    for name, tensor in {**twin.state_dict(), "row_offsets": twin.row_offsets}.items():
        assert torch.equal(getattr(module, name), tensor), name
    x = torch.randn(2, 77).half()
    assert torch.equal(module(x), twin(x))
    for other in (torch.float64, torch.int8):
        with pytest.raises(ValueError, match=f"float16, got {other}"):
            module.type(other)
    assert torch.equal(module(x), twin(x))


@pytest.mark.parametrize("shape", [(77,), (3, 77), (2, 5, 77), (0, 77)])
def test_12_bits_multiply_as_the_values_that_they_are(shape: tuple[int, ...]) -> None:
    module = sparse(pruned(dtype=torch.bfloat16), 12)
    assert (module.bits, module.dtype, module.weight.dtype) == (12, *[torch.bfloat16] * 2)
    x = torch.randn(shape).bfloat16()
    torch.testing.assert_close(module(x), module.to_linear()(x), **tolerance(torch.bfloat16))
    assert torch.equal(module.to_linear().weight, pruned(dtype=torch.bfloat16).weight)
    assert module.memory_bytes == module.sparse_weight.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_of_12_bits_become_plain_in_another_dtype(dtype: torch.dtype) -> None:
    module = sparse(pruned(dtype=torch.bfloat16), 12)
    expected = module.to_linear().weight.to(dtype)
    x = torch.randn(2, 77)
    module(x.bfloat16())
    module.to(dtype)
    assert (module.bits, module.dtype, module.weight_codebook) == (16, dtype, None)
    assert torch.equal(module.to_linear().weight, expected)
    torch.testing.assert_close(module(x.to(dtype)), x.to(dtype) @ expected.T + module.bias)
    assert "weight_codebook" not in module.state_dict()


def test_a_cast_that_changes_nothing_leaves_the_parameters() -> None:
    module = sparse(pruned(dtype=torch.bfloat16), 12)
    before = module.weight_values
    module.to(torch.bfloat16)
    assert module.weight_values is before
    assert module.bits == 12


def test_gradients_flow_through_12_bits() -> None:
    module = sparse(pruned(dtype=torch.bfloat16), 12)
    x = torch.randn(3, 77, dtype=torch.bfloat16, requires_grad=True)
    module(x).sum().backward()
    expected = module.to_linear().weight.sum(0).expand(3, 77)
    torch.testing.assert_close(x.grad, expected, rtol=0.05, atol=0.05)


def test_12_bits_are_copied_pickled_and_loaded() -> None:
    module = sparse(pruned(dtype=torch.bfloat16), 12)
    x = torch.randn(2, 77).bfloat16()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))
        assert (twin.bits, twin.dtype) == (12, torch.bfloat16)
    other = pruned(dtype=torch.bfloat16)
    with torch.no_grad():
        other.weight[torch.rand(24, 77) < 0.5] = 0.0
        other.weight[4, :60] = 2.0 ** -torch.arange(60)  # thirty upper bytes
    state = sparse(other, 12).state_dict()
    assert state["weight_codebook"].numel() != module.weight_codebook.numel()
    module.load_state_dict(state)
    assert torch.equal(module.weight + 0, other.weight + 0)
    damaged = state | {"weight_codebook": state["weight_codebook"] + 1}
    with pytest.raises(RuntimeError, match="code 0 of a codebook"):
        module.load_state_dict(damaged)
    without = {n: t for n, t in state.items() if n != "weight_codebook"}
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_codebook"):
        module.load_state_dict(without)
    with pytest.raises(RuntimeError, match="values of 12 bits are needed, got 16"):
        module.load_state_dict(sparse(other).state_dict())


def test_autocast_casts_the_input() -> None:
    module = sparse(pruned(dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert module(torch.randn(2, 77)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"must be torch.bfloat16"):
        module(torch.randn(2, 77))


@pytest.mark.parametrize("bits", BITS)
def test_copies_are_whole_and_their_own(bits: int) -> None:
    module = sparse(pruned(), bits)
    x = torch.randn(2, 77)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))
        assert twin.weight_values.data_ptr() != module.weight_values.data_ptr()
        assert isinstance(twin.weight_values, FrozenParameter)
        assert (twin.bits, twin.group_size) == (module.bits, module.group_size)


def test_it_reaches_another_process(tmp_path: Path) -> None:
    module = sparse(pruned(), 4, 32)
    (tmp_path / "module").write_bytes(pickle.dumps(module))
    script = (
        "import pickle, sys, torch; m = pickle.load(open(sys.argv[1], 'rb')); "
        "print(m(torch.ones(77)).sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "module")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(module(torch.ones(77)).sum().item(), rel=1e-5)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_state_dicts_load_whatever_their_mask(bits: int, assign: bool) -> None:
    module = sparse(pruned(), bits)
    other = pruned()
    with torch.no_grad():
        other.weight[torch.rand(24, 77) < 0.5] = 0.0
    state = sparse(other, bits).state_dict()
    assert "row_offsets" not in state
    module.load_state_dict(state, assign=assign)
    assert torch.equal(module.weight + 0, sparse(other, bits).weight + 0)
    assert isinstance(module.weight_values, FrozenParameter)
    module(torch.zeros(77))


def test_state_dicts_that_do_not_fit_are_refused_and_change_nothing() -> None:
    module = sparse(pruned())
    before = module(torch.ones(77))
    state = module.state_dict()
    damaged = state | {"weight_values": state["weight_values"][1:]}
    with pytest.raises(RuntimeError, match=r"keeps .* weights but .* the two must agree"):
        module.load_state_dict(damaged)
    with pytest.raises(RuntimeError, match=r"values of 16 bits are needed, got 8"):
        module.load_state_dict(sparse(pruned(), 8).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_bitmask"):
        module.load_state_dict({n: t for n, t in state.items() if n != "weight_bitmask"})
    assert torch.equal(module(torch.ones(77)), before)


def test_conversion_there_and_back_is_exact() -> None:
    model = nn.Sequential(pruned(), nn.ReLU(), pruned(40, 24)).eval()
    weights = [model[0].weight.clone(), model[2].weight.clone()]
    bias = model[0].bias
    compress_(model, {"0": ValueFormat(16), "2": ValueFormat(16)})
    assert list(sparse_linears(model)) == ["0", "2"]
    assert model[0].bias is bias
    assert not model[0].training
    with pytest.raises(ValueError, match=r"'0' must be a plain nn.Linear, it is SparseLinear"):
        compress_(model, {"0": ValueFormat(16)})
    decompress_(model)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, weights[0])
    assert torch.equal(model[2].weight, weights[1])


def test_a_weight_that_is_not_there_is_not_compressed() -> None:
    with pytest.raises(ValueError, match=r"'0' is offloaded"):
        compress_(nn.Sequential(nn.Linear(4, 4, device="meta")), {"0": ValueFormat(16)})


def test_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(24, 77\) .* got \(8, 77\)"):
        sparse(pruned()).set_weight(SparseWeight.from_dense(torch.zeros(8, 77)))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [16, 12, 4])
def test_torch_compile_sees_one_graph(bits: int) -> None:
    dtype = torch.bfloat16 if bits == 12 else torch.float32
    first, second = pruned(dtype=dtype), pruned(40, 24, dtype)
    model = nn.Sequential(sparse(first, bits), nn.ReLU(), sparse(second, bits))
    compiled = torch.compile(model, fullgraph=True)
    for rows in (1, 5):
        x = torch.randn(rows, 77, dtype=dtype, requires_grad=True)
        torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    twin = x.detach().clone().requires_grad_()
    model(twin).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)


def test_what_is_compiled_stays_so_when_it_is_called_without() -> None:
    module, other = _other_masks(16)
    x = torch.randn(3, 77, dtype=torch.bfloat16)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert torch.equal(compiled(x), module(x))
            module.load_state_dict(other.state_dict())


def test_tracers_and_autograd_see_the_operator() -> None:
    weight, x = SparseWeight.from_dense(pruned().weight.detach()), torch.randn(3, 77)
    seen = torch.ops.hf_adaptive_sparse.linear.default
    traced = make_fx(lambda x: operator.linear(x, weight, None))(x)
    assert seen in {node.target for node in traced.graph.nodes}
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        assert isinstance(operator.linear(fakes.from_tensor(x), weight, None), FakeTensor)
    x.requires_grad_()
    recorded = operator.linear(x, weight, None)
    recorded.sum().backward()
    torch.testing.assert_close(x.grad, weight.to_dense().sum(0).expand(3, 77))
    assert torch.equal(operator.linear(x.detach(), weight, None), recorded)


@pytest.mark.parametrize("bits", BITS)
def test_without_numbers_it_computes_shapes(bits: int) -> None:
    module, x = sparse(pruned(), bits).to("meta"), torch.empty(2, 5, 77, device="meta")
    x.requires_grad_()
    output = module(x)
    assert (output.device, output.shape) == (x.device, (2, 5, 24))
    output.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("bits", BITS)
def test_what_changes_after_a_forward_is_seen_by_the_next(bits: int) -> None:
    first, second = pruned(), pruned()
    with torch.no_grad():
        second.weight.mul_(2.0)[5] = 0.0
    module, x = sparse(first, bits), torch.randn(2, 77)
    module(x)
    module.load_state_dict(sparse(second, bits).state_dict())
    torch.testing.assert_close(module(x), sparse(second, bits)(x))
    half = module.to(torch.bfloat16)
    wanted = half.to_linear()(x.bfloat16())
    torch.testing.assert_close(half(x.bfloat16()), wanted, **tolerance(torch.bfloat16))
    copied = copy.deepcopy(half)
    copied.set_weight(sparse(first.bfloat16(), bits).sparse_weight)
    torch.testing.assert_close(half(x.bfloat16()), wanted, **tolerance(torch.bfloat16))


def _other_masks(bits: int) -> tuple[SparseLinear, SparseLinear]:
    """Two linears that keep as many weights, in other places."""
    first = pruned(dtype=torch.bfloat16)
    second = nn.Linear(77, 24).bfloat16()
    with torch.no_grad():
        second.weight.copy_(first.weight.flatten()[torch.randperm(24 * 77)].view(24, 77))
        second.bias.copy_(first.bias)
    return sparse(first, bits), sparse(second, bits)


def _put_parameters(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    for name, value in values.items():
        setattr(module, name, nn.Parameter(value, requires_grad=False))


def _put_data(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    for name, value in values.items():
        getattr(module, name).data = value


def _copy_data(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    with torch.inference_mode():  # which a tensor that was made outside of it counts, too
        for name, value in values.items():
            parameter = getattr(module, name)
            if parameter.shape != value.shape:  # a codebook's
                parameter.data = value.clone()
            parameter.copy_(value)


@pytest.mark.parametrize("replace", [_put_parameters, _put_data, _copy_data])
@pytest.mark.parametrize("bits", [16, 12, 8, 4])
def test_another_mask_in_the_parameters_place_is_counted(bits: int, replace: Callable) -> None:
    module, other = _other_masks(bits)
    x = torch.randn(3, 77, dtype=torch.bfloat16)
    wanted = other(x)
    module(x)  # keeps what it has worked out
    replace(module, {name: p.detach().clone() for name, p in other.named_parameters()})
    assert torch.equal(module(x), wanted)
    assert torch.equal(copy.deepcopy(module)(x), wanted)
    assert torch.equal(module.to(torch.float32).to_dense(), other.to(torch.float32).to_dense())


@pytest.mark.parametrize("is_strided", [False, True])
@pytest.mark.parametrize("bits", [16, 12, 8, 4])
def test_a_functional_call_takes_what_it_is_given(bits: int, is_strided: bool) -> None:
    module, other = _other_masks(bits)
    x = torch.randn(3, 77, dtype=torch.bfloat16, requires_grad=True)
    own, wanted = module(x), other(x)
    given = {name: p.detach() for name, p in other.named_parameters()}
    if is_strided:
        given = {name: torch.stack([p, p], dim=-1)[..., 0] for name, p in given.items()}
    for _ in range(2):
        found = torch.func.functional_call(module, given, (x,))
        assert torch.equal(found, wanted)
        assert torch.equal(module(x), own)
    (expected,) = torch.autograd.grad(wanted.sum(), x)
    assert torch.equal(torch.autograd.grad(found.sum(), x)[0], expected)


def test_a_mask_that_keeps_another_number_of_weights_is_refused() -> None:
    module = sparse(pruned())
    module(torch.zeros(77))
    with torch.no_grad():
        module.weight_bitmask[0] = 0
    with pytest.raises(BitmaskError, match="the two must agree"):
        module(torch.zeros(77))


@pytest.mark.parametrize("dim", [0, 1])
def test_masks_are_mapped_over(dim: int) -> None:
    modules = _other_masks(16)
    x = torch.randn(3, 77, dtype=torch.bfloat16)
    names = ("weight_values", "weight_bitmask", "row_offsets")
    stacked = {n: torch.stack([getattr(m, n).detach() for m in modules], dim) for n in names}

    def call(parts: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(modules[0], parts, (x,))

    for found, module in zip(torch.vmap(call, in_dims=dim)(stacked), modules, strict=True):
        assert torch.equal(found, module(x))


def test_offsets_outlive_moves_and_the_modes_they_were_made_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, other = _other_masks(16)
    x = torch.randn(3, 77, dtype=torch.bfloat16, requires_grad=True)
    _put_data(module, {name: p.detach() for name, p in other.named_parameters()})
    with torch.inference_mode():
        module(x)
    module(x).sum().backward()  # torch saves no tensor of inference mode

    def count(bitmask: torch.Tensor) -> torch.Tensor:
        raise AssertionError("counted again")

    monkeypatch.setattr(sparse_linear, "count_row_offsets", count)
    for moved in (module.to("cpu"), module.float(), module.share_memory()):
        moved(x.to(moved.dtype))


@pytest.mark.skipif(library() is None, reason="there is no native library")
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("tokens", [1, 100])
def test_a_mask_that_was_replaced_unnoticed_is_refused(bits: int, tokens: int) -> None:
    module, other = _other_masks(bits)
    x = torch.ones(tokens, 77, dtype=torch.bfloat16)
    module(x)
    module.weight_bitmask.data.copy_(other.weight_bitmask.data)  # of which torch keeps no count
    with pytest.raises(RuntimeError, match="load others with load_state_dict"):
        module(x)
    module.settle()
    assert torch.equal(module.row_offsets, other.row_offsets)


@pytest.mark.parametrize("bits", [16, 12, 8, 4])
def test_a_module_is_emptied_and_loaded(bits: int) -> None:
    module = sparse(pruned(dtype=torch.bfloat16), bits)
    x = torch.randn(3, 77, dtype=torch.bfloat16)
    emptied = copy.deepcopy(module).to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in emptied.parameters():
            parameter.fill_(1)
    emptied.to("cpu").load_state_dict(module.state_dict())
    assert torch.equal(emptied(x), module(x))


@pytest.mark.parametrize("how", ["swap", "overwrite"])
@pytest.mark.parametrize("bits", BITS)
def test_parameters_may_be_replaced_by_casts(
    how: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, twin = sparse(pruned(), bits), sparse(pruned(), bits)
    wanted = twin.bfloat16()(torch.ones(2, 77, dtype=torch.bfloat16))
    module(torch.ones(77))
    monkeypatch.setattr(torch.__future__, f"_{how}_module_params_on_conversion", True)
    assert torch.equal(module.bfloat16()(torch.ones(2, 77, dtype=torch.bfloat16)), wanted)
