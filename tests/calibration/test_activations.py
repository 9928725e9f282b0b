"""Norms and Hessians of the inputs of linears."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_adaptive_sparse.architecture import prunable_weights
from hf_adaptive_sparse.calibration.activations import collect_inputs
from hf_adaptive_sparse.calibration.token_weights import token_weights


def test_token_weights(tiny_llava, image_batches):
    batch = image_batches[0] | {"attention_mask": image_batches[0]["attention_mask"].clone()}
    batch["attention_mask"][0, -3:] = 0
    weights = token_weights(batch, tiny_llava.config, image_weight=0.25)
    assert weights.dtype == torch.float32
    assert weights[1, 1:5].tolist() == [0.25] * 4
    assert weights[0, -3:].tolist() == [0.0] * 3
    assert weights.sum() == 2 * 4 * 0.25 + 2 * 12 - 3


def test_token_weights_of_embeddings_and_errors(tiny_llama):
    embeds = torch.zeros(2, 3, 64)
    assert token_weights({"inputs_embeds": embeds}, tiny_llama.config).tolist() == [[1.0] * 3] * 2
    with pytest.raises(ValueError, match=r"input_ids .* it has labels"):
        token_weights({"labels": embeds}, tiny_llama.config)
    bad = {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 1, 3, 3)}
    with pytest.raises(ValueError, match="attention_mask must have the shape"):
        token_weights(bad, tiny_llama.config)


def test_sums_against_direct_evaluation():
    torch.manual_seed(0)
    linear = nn.Linear(7, 3)
    inputs = [torch.randn(2, 5, 7, dtype=torch.bfloat16), torch.randn(2, 9, 7).bfloat16()]
    weights = [torch.rand(2, 5), torch.rand(2, 9)]
    weights[0][0, :3] = 0
    linear.bfloat16()
    with collect_inputs({"a": linear}, hessian=True) as statistics:
        for x, w in zip(inputs, weights, strict=True):
            statistics.token_weights = w
            linear(x)
    rows = torch.cat([x.reshape(-1, 7) for x in inputs]).double()
    w = torch.cat([w.reshape(-1) for w in weights]).double()
    expected = (rows.square() * w[:, None]).sum(0).sqrt()
    torch.testing.assert_close(statistics.input_norm("a").double(), expected, rtol=1e-6, atol=0)
    hessian = statistics.statistic("a").hessian
    torch.testing.assert_close(
        hessian.double(), rows.t() @ (rows * w[:, None]), rtol=1e-5, atol=1e-5
    )
    assert statistics.statistic("a").tokens == pytest.approx(float(w.sum()))


def test_chunks_do_not_change_the_sums(monkeypatch):
    linear, x = nn.Linear(5, 2), torch.randn(64, 5)
    norms = []
    for elements in (1 << 20, 15):
        monkeypatch.setattr("hf_adaptive_sparse.calibration.activations._CHUNK_ELEMENTS", elements)
        with collect_inputs({"a": linear}) as statistics:
            linear(x)
        norms.append(statistics.input_norm("a"))
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-6, atol=0)


def test_padding_rows_may_be_anything():
    linear = nn.Linear(3, 2)
    x = torch.ones(1, 4, 3)
    x[0, 0] = torch.nan
    with collect_inputs({"a": linear}) as statistics:
        statistics.token_weights = torch.tensor([[0.0, 1, 1, 1]])
        linear(x)
    assert statistics.input_norm("a").tolist() == pytest.approx([3**0.5] * 3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_activations_name_the_linear(bad):
    linear = nn.Linear(3, 2)
    x = torch.ones(1, 4, 3)
    x[0, 2, 1] = bad
    with (
        pytest.raises(ValueError, match=r"inputs of 'layers\.0\.up' must be finite"),
        collect_inputs({"layers.0.up": linear}),
    ):
        linear(x)
    assert not linear._forward_pre_hooks


def test_rows_that_are_no_tokens_count_one_each():
    linear = nn.Linear(3, 2)
    with collect_inputs({"a": linear}) as statistics:
        statistics.token_weights = torch.zeros(1, 8)
        linear(torch.ones(5, 3))
    assert statistics.statistic("a").tokens == 5


def test_linears_of_one_input_share_their_sums(tiny_llama, text_batches):
    linears = prunable_weights(tiny_llama)
    with collect_inputs(linears) as statistics:
        for batch in text_batches[:2]:
            tiny_llama(**batch)
    layer = "model.layers.1."
    q, k = (statistics.statistic(layer + f"self_attn.{n}_proj") for n in "qk")
    gate, up = (statistics.statistic(layer + f"mlp.{n}_proj") for n in ("gate", "up"))
    assert q is k
    assert gate is up
    assert q is not gate
    assert q.tokens == 2 * 64


def merged_attention(q, k, v, own, other):
    for linear, inputs in ((q, own), (k, own), (v, own), (k, other), (v, other)):
        linear(inputs)


def test_a_linear_that_is_handed_another_tensor_parts_from_the_others():
    linears = {name: nn.Linear(3, 2) for name in "qkv"}
    batches = [(torch.randn(1, 4, 3), torch.randn(1, 6, 3)) for _ in range(2)]
    with collect_inputs(linears, hessian=True) as statistics:
        for own, other in batches:
            statistics.token_weights = torch.tensor([[1.0, 1, 0, 0]])
            statistics.encoder_weights = torch.tensor([[0.0, 1, 1, 1, 1, 1]])
            merged_attention(*linears.values(), own, other)
    q, k, v = (statistics.statistic(name) for name in "qkv")
    assert k is v
    own = torch.cat([own[0, :2] for own, _ in batches])
    both = torch.cat([own, *(other[0, 1:] for _, other in batches)])
    for found, rows in ((q, own), (k, both)):
        assert found.tokens == found.rows == rows.shape[0]
        torch.testing.assert_close(found.norm, rows.norm(dim=0))
        torch.testing.assert_close(found.hessian, rows.t() @ rows)


def test_what_was_shared_with_more_batches_cannot_be_parted():
    linears = {name: nn.Linear(3, 2) for name in "qk"}
    first, second, third = torch.randn(3, 4, 3)
    with collect_inputs(linears):
        linears["q"](first)
        linears["k"](first)
        linears["q"](second)
        with pytest.raises(ValueError, match="'k' must read the tensors that 'q' reads"):
            linears["k"](third)


def test_no_tokens_is_an_error_and_hooks_go_after_exceptions():
    linear = nn.Linear(3, 2)
    with collect_inputs({"a": linear}) as statistics:
        pass
    with pytest.raises(ValueError, match="No calibration token reached 'a'"):
        statistics.input_norm("a")
    with pytest.raises(RuntimeError, match="stop"), collect_inputs({"a": linear}):
        raise RuntimeError("stop")
    assert not linear._forward_pre_hooks


def test_contexts_nest():
    linear, x = nn.Linear(3, 2), torch.ones(2, 3)
    with collect_inputs({"a": linear}) as outer:
        with collect_inputs({"a": linear}) as inner:
            linear(x)
        linear(x * 1)
    assert inner.statistic("a").tokens == 2
    assert outer.statistic("a").tokens == 4
