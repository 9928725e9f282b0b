from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional
from transformers import FSMTConfig, FSMTForConditionalGeneration, MarianConfig, MarianMTModel

import hf_adaptive_sparse as has
from hf_adaptive_sparse.calibration.records import DataError
from hf_adaptive_sparse.calibration.token_ids import check_token_ids
from hf_adaptive_sparse.errors import NonFiniteError
from hf_adaptive_sparse.evaluation import perplexity as module
from hf_adaptive_sparse.evaluation import scoring
from hf_adaptive_sparse.evaluation.forward import evaluating
from hf_adaptive_sparse.evaluation.perplexity import negative_log_likelihood, perplexity
from hf_adaptive_sparse.evaluation.windows import longest_window
from hf_adaptive_sparse.profiles import KVCacheConfig


def by_hand(model, rows: list[list[int]]) -> float:
    """Perplexity of unpadded rows, each in its own forward."""
    losses: list[float] = []
    for row in rows:
        with torch.no_grad():
            log_probs = model(torch.tensor([row])).logits[0].double().log_softmax(-1)
        losses += [-float(log_probs[i, row[i + 1]]) for i in range(len(row) - 1)]
    return math.exp(sum(losses) / len(losses))


def random_rows(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, 128, (n,), generator=generator).tolist() for n in lengths]


def padded(rows: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def single(row: list[int]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([row])}


def test_ids_may_be_narrower_than_int64(tiny_llama, text_batches) -> None:
    narrow = [batch | {"input_ids": batch["input_ids"].int()} for batch in text_batches]
    assert perplexity(tiny_llama, narrow) == perplexity(tiny_llama, text_batches)


def test_uniform_model(tiny_llama) -> None:
    """Zero logits: every token has probability 1/vocabulary."""
    torch.nn.init.zeros_(tiny_llama.model.norm.weight)
    assert perplexity(tiny_llama, [single([5, 6, 7])]) == pytest.approx(128.0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_size_change_nothing(tiny_llama, side: str) -> None:
    rows = random_rows(20, 7, 13, 2)
    expected = by_hand(tiny_llama, rows)
    assert perplexity(tiny_llama, [padded(rows, side)]) == pytest.approx(expected, rel=1e-5)
    assert perplexity(tiny_llama, [single(row) for row in rows]) == pytest.approx(expected, 1e-5)
    pairs = [padded(rows[:2], side), padded(rows[2:], side)]
    assert perplexity(tiny_llama, pairs) == pytest.approx(expected, rel=1e-5)


def test_weighted_by_tokens_not_by_batches(tiny_llama) -> None:
    rows = random_rows(3, 30)
    (a, n), (b, m) = (negative_log_likelihood(tiny_llama, single(row)) for row in rows)
    assert (n, m) == (2, 29)
    expected = math.exp((a + b) / 31)
    assert perplexity(tiny_llama, [single(row) for row in rows]) == pytest.approx(expected)


def test_labels_say_what_is_scored(tiny_llama) -> None:
    (row,) = random_rows(12)
    labels = torch.full((1, 12), -100)
    labels[0, 8:10] = torch.tensor(row[8:10])
    with torch.no_grad():
        log_probs = tiny_llama(torch.tensor([row])).logits[0].log_softmax(-1)
    expected = -float(log_probs[7, row[8]] + log_probs[8, row[9]])
    total, count = negative_log_likelihood(tiny_llama, single(row) | {"labels": labels})
    assert count == 2
    assert total == pytest.approx(expected, rel=1e-5)


def test_image_tokens_are_never_scored(tiny_llava, image_batches) -> None:
    batch = image_batches[0]
    total, count = negative_log_likelihood(tiny_llava, batch)
    assert count == 2 * (16 - 1 - 4)
    with torch.no_grad():
        logits = tiny_llava(**batch).logits[:, :-1]
    targets = batch["input_ids"][:, 1:].clone()
    targets[targets == 4] = -100
    expected = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="sum")
    assert total == pytest.approx(float(expected), rel=1e-5)
    # Not even where labels name them.
    assert negative_log_likelihood(tiny_llava, batch | {"labels": batch["input_ids"]})[1] == count


@pytest.mark.parametrize("budget", [1, 128 * 5, 128 * 7 + 3])
def test_chunks_change_nothing(tiny_llama, text_batches, monkeypatch, budget: int) -> None:
    whole = negative_log_likelihood(tiny_llama, text_batches[0])
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", budget)
    chunked = negative_log_likelihood(tiny_llama, text_batches[0])
    assert chunked[1] == whole[1]
    assert chunked[0] == pytest.approx(whole[0], rel=1e-6)


def test_losses_are_computed_in_float32(tiny_llama, text_batches) -> None:
    exact = perplexity(tiny_llama, text_batches)
    assert perplexity(tiny_llama.bfloat16(), text_batches) == pytest.approx(exact, rel=2e-3)


def test_pixels_get_the_models_dtype(tiny_llava, image_batches) -> None:
    assert math.isfinite(perplexity(tiny_llava.bfloat16(), image_batches))


class TestCache:
    @pytest.fixture
    def batches(self) -> list[dict[str, torch.Tensor]]:
        return [single(row) for row in random_rows(96, 130)]

    @pytest.fixture
    def model(self, tiny_llama):
        """The random model, sharpened so that attention matters."""
        for layer in tiny_llama.model.layers:
            layer.self_attn.q_proj.weight.data *= 10
            layer.self_attn.k_proj.weight.data *= 10
            layer.self_attn.v_proj.weight.data *= 20
        return tiny_llama

    def test_16_bits_are_the_dense_figure(self, model, batches) -> None:
        dense = perplexity(model, batches)
        assert perplexity(model, batches, KVCacheConfig(bits=16)) == dense

    def test_few_bits_show(self, model, batches) -> None:
        dense = perplexity(model, batches)

        def shift(bits: int) -> float:
            return abs(perplexity(model, batches, KVCacheConfig(bits=bits)) / dense - 1)

        assert shift(2) > 4 * shift(8) > 0
        assert shift(2) > 1e-3

    def test_models_own_profile(self, model, batches) -> None:
        dense = perplexity(model, batches)
        two = perplexity(model, batches, KVCacheConfig(bits=2))
        model = copy.deepcopy(model)
        model.config.quantization_config = {
            "quant_method": "adaptive_sparse",
            "kv_cache": KVCacheConfig(bits=2).to_dict(),
        }
        assert perplexity(model, batches) == two
        assert perplexity(model, batches, False) == dense
        eight = KVCacheConfig(bits=8)
        assert perplexity(model, batches, eight) == pytest.approx(dense, rel=1e-2)

    @pytest.mark.parametrize("choice", [True, 8, {"bits": 8}])
    def test_other_choices_are_refused(self, model, batches, choice: object) -> None:
        with pytest.raises(TypeError, match="kv_cache must be None"):
            perplexity(model, batches, choice)  # type: ignore[arg-type]


def test_mode_and_gradients_are_restored(tiny_llama, text_batches) -> None:
    tiny_llama.train()
    tiny_llama.model.norm.eval()
    perplexity(tiny_llama, text_batches[:1])
    assert tiny_llama.training
    assert tiny_llama.model.layers[0].training
    assert not tiny_llama.model.norm.training
    with pytest.raises(RuntimeError), evaluating(tiny_llama):
        assert not tiny_llama.training
        raise RuntimeError
    assert tiny_llama.training
    assert torch.is_grad_enabled()


def test_batches_may_be_a_generator(tiny_llama, text_batches) -> None:
    expected = perplexity(tiny_llama, text_batches)
    assert perplexity(tiny_llama, (b for b in text_batches), progress=True) == expected


def test_nan_names_the_batch(tiny_llava, image_batches) -> None:
    image_batches[1]["pixel_values"][0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="batch 1 gives nan"):
        perplexity(tiny_llava, image_batches)


@pytest.mark.parametrize(
    "wrong_ids",
    [
        pytest.param([[5, 128, 7]], id="beyond the vocabulary"),
        pytest.param([[5, -1, 7]], id="negative"),
    ],
)
@pytest.mark.parametrize(
    "use",
    [
        has.perplexity,
        lambda model, batches: has.prune(model, has.SparsityConfig(), batches),
    ],
)
def test_ids_of_another_tokenizer_are_refused(tiny_llama, wrong_ids, use) -> None:
    batches = [{"input_ids": torch.tensor(wrong_ids)}]
    with pytest.raises(DataError, match=r"vocabulary of 128 tokens, 0 to 127; .* must belong"):
        use(tiny_llama, batches)


@pytest.mark.parametrize("label", [128, -1])
def test_labels_of_another_tokenizer_are_refused(tiny_llama, label) -> None:
    batch = single([5, 6, 7]) | {"labels": torch.tensor([[-100, 6, label]])}
    with pytest.raises(DataError, match=rf"labels must be .* 0 to 127, or -100 .*; got {label}\."):
        perplexity(tiny_llama, [batch])


@pytest.mark.parametrize("name", ["input_ids", "decoder_input_ids"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.bool])
def test_ids_of_a_dtype_that_no_embedding_takes_are_refused(tiny_llama, name, dtype) -> None:
    batch = single([5, 6, 7]) | {name: torch.tensor([[5, 6, 7]]).to(dtype)}
    with pytest.raises(DataError, match=f"{name} must be whole numbers .* has {dtype}"):
        perplexity(tiny_llama, [batch])


def test_image_tokens_may_lie_outside_the_vocabulary(tiny_llava) -> None:
    batch = {"input_ids": torch.tensor([[5, 5000, 7]])}
    tiny_llava.config.image_token_id = 5000
    check_token_ids(batch, tiny_llava)


def test_a_decoder_may_have_a_vocabulary_of_its_own() -> None:
    sizes = {"vocab_size": 50, "decoder_vocab_size": 90, "d_model": 16, "pad_token_id": 1}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "decoder_start_token_id": 1}
    config = MarianConfig(**sizes, **layers, share_encoder_decoder_embeddings=False)
    model = MarianMTModel(config)
    ids, read = torch.tensor([[60, 89, 61]]), torch.tensor([[5, 6]])
    batch = {"input_ids": read, "decoder_input_ids": ids, "labels": ids}
    assert math.isfinite(perplexity(model, [batch]))
    with pytest.raises(DataError, match=r"decoder_input_ids .* vocabulary of 90 tokens"):
        perplexity(model, [batch | {"decoder_input_ids": ids + 1}])
    with pytest.raises(DataError, match=r"input_ids .* vocabulary of 50 tokens"):
        perplexity(model, [batch | {"input_ids": read + 45}])


def test_ids_of_a_decoder_that_names_no_embeddings_are_left_to_the_model() -> None:
    config = FSMTConfig(
        langs=["a", "b"], src_vocab_size=50, tgt_vocab_size=90, d_model=16,
        encoder_layers=1, decoder_layers=1,
    )  # fmt: skip
    ids = torch.tensor([[60, 89, 61]])
    batch = {"input_ids": torch.tensor([[5, 6]]), "decoder_input_ids": ids}
    check_token_ids(batch, FSMTForConditionalGeneration(config))


def test_nothing_to_score(tiny_llama) -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        perplexity(tiny_llama, [])
    for batch in (single([5]), single([5, 6]) | {"attention_mask": torch.tensor([[1, 0]])}):
        assert negative_log_likelihood(tiny_llama, batch) == (0.0, 0)
        with pytest.raises(ValueError, match="at least one scored token"):
            perplexity(tiny_llama, [batch])
    with pytest.raises(ValueError, match="input_ids or labels"):
        perplexity(tiny_llama, [{"inputs_embeds": torch.zeros(1, 2, 64)}])


@pytest.mark.parametrize("batches", [None, "wikitext", single([5, 6])])
def test_names_and_single_batches_are_refused(tiny_llama, batches: object) -> None:
    with pytest.raises(TypeError, match="load_batches"):
        perplexity(tiny_llama, batches)  # type: ignore[arg-type]


def test_overflow_is_infinite(tiny_llama, monkeypatch) -> None:
    monkeypatch.setattr(module, "negative_log_likelihood", lambda *_: (1e6, 1))
    assert perplexity(tiny_llama, [single([5, 6])]) == math.inf


@pytest.mark.parametrize(
    ("tokens", "changes", "said"),
    [
        (31, {}, "longest: 31 tokens) fills a block of the KV cache (residual_length=32)"),
        (32, {}, ""),
        (35, {"sink_length": 4}, "(residual_length=32 and sink_length=4), so nothing is quantised"),
        (36, {"sink_length": 4}, ""),
    ],
)
def test_windows_that_fill_no_block_are_remarked_on(
    tiny_llama, caplog, tokens: int, changes: dict[str, int], said: str
) -> None:
    config = KVCacheConfig(bits=2, residual_length=32, **changes)
    batches = [single(row) for row in random_rows(tokens, 9)]
    plain = perplexity(tiny_llama, batches, False)
    assert not caplog.records
    quantised = perplexity(tiny_llama, batches, config)
    assert (quantised == pytest.approx(plain, rel=1e-6)) == bool(said)
    assert len(caplog.records) == bool(said)
    assert said in caplog.text


def test_the_longest_window_is_that_of_all_batches() -> None:
    ids = torch.zeros(1, 31, dtype=torch.int64)
    assert (
        longest_window([{"input_ids": ids[:, :9]}, {"input_ids": ids[:, :31]}, single([5])]) == 31
    )
    assert longest_window([single([5]), {"input_features": torch.zeros(1, 80, 3000)}]) == 1
    assert longest_window([]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": torch.tensor([5, 6, 7])}, r"shape \(batch, seq\).* batch 1 has \(3,\)"),
        ({"labels": torch.tensor([[5, 6]])}, r"labels must have the shape \(1, 3\).* has \(1, 2\)"),
        (
            {"attention_mask": torch.ones(1, 1, 3, 3)},
            r"attention_mask must have the shape \(1, 3\)",
        ),
    ],
)
def test_batches_of_wrong_shapes_are_named(tiny_llama, changes, message: str) -> None:
    good = single([5, 6, 7])
    with pytest.raises(DataError, match=message):
        perplexity(tiny_llama, [good, good | changes])
