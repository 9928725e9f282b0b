"""Encoder-decoders: the encoder never reads what the decoder has to predict."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import BartConfig

import hf_adaptive_sparse as has
from hf_adaptive_sparse.architecture import decoder_layers, prunable_weights
from hf_adaptive_sparse.calibration.activations import collect_inputs
from hf_adaptive_sparse.calibration.forward import run_decoder
from hf_adaptive_sparse.calibration.sequence_pairs import sequence_pairs
from hf_adaptive_sparse.calibration.token_weights import encoder_weights, token_weights
from hf_adaptive_sparse.evaluation.forward import new_cache
from hf_adaptive_sparse.kvcache.cache import AdaptiveQuantizedCache
from hf_adaptive_sparse.pruning.one_shot import rank_model
from tests.families.catalogue import FAMILIES
from tests.families.matrix import make_batch
from tests.families.tiny_models import tiny_model

IMAGE = 4
CONFIG = BartConfig(pad_token_id=0, decoder_start_token_id=7, image_token_id=IMAGE)
NONE = -100
FLORENCE = next(f for f in FAMILIES if f.model_type == "florence2")


def divided(ids, labels=None, mask=None):
    batch = {"input_ids": torch.tensor(ids)}
    if labels is not None:
        batch["labels"] = torch.tensor(labels)
    if mask is not None:
        batch["attention_mask"] = torch.tensor(mask)
    pairs = sequence_pairs(batch, CONFIG)
    assert "labels" not in pairs.inputs
    read, fed = pairs.inputs["attention_mask"], pairs.inputs["decoder_input_ids"]
    return read.tolist(), fed.tolist(), pairs.targets.tolist()


def test_labelled_tokens_are_predicted_and_what_is_before_them_is_read():
    assert divided(
        [[10, 11, 12, 13, 2], [20, 21, 22, 2, 0]],
        labels=[[NONE, NONE, 12, 13, NONE], [NONE, 21, NONE, NONE, NONE]],
        mask=[[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]],
    ) == (
        [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]],
        [[7, 12], [7, 21]],
        [[12, 13], [21, NONE]],
    )


@pytest.mark.parametrize("labels", [None, [[10, 11, 12, 13], [0, 21, 22, 23]]])
def test_without_a_part_to_read_rows_are_halved(labels):
    assert divided(
        [[10, 11, 12, 13], [0, 21, 22, 23]], labels, mask=[[1, 1, 1, 1], [0, 1, 1, 1]]
    ) == ([[1, 1, 0, 0], [0, 1, 0, 0]], [[7, 12], [7, 22]], [[12, 13], [22, 23]])


@pytest.mark.parametrize("labels", [None, [[10, IMAGE, IMAGE, IMAGE, 11, 12, 13]]])
def test_images_are_read_and_text_alone_is_halved(labels):
    assert divided([[10, IMAGE, IMAGE, IMAGE, 11, 12, 13]], labels) == (
        [[1, 1, 1, 1, 1, 0, 0]],
        [[7, 12]],
        [[12, 13]],
    )


def test_an_image_in_an_answer_is_read_and_not_predicted():
    assert divided([[10, 11, IMAGE, 12]], [[NONE, 11, IMAGE, 12]]) == (
        [[1, 0, 1, 0]],
        [[7, 11]],
        [[11, 12]],
    )


def test_nothing_to_predict():
    assert divided([[10, 11]], [[NONE, NONE]]) == ([[1, 1]], [[7]], [[NONE]])


def test_embeddings_alone_cannot_be_divided():
    with pytest.raises(ValueError, match=r"must have input_ids.*has inputs_embeds"):
        sequence_pairs({"inputs_embeds": torch.zeros(1, 2, 4)}, CONFIG)


GIVEN = {
    "input_ids": torch.tensor([[10, 11, 12]]),
    "decoder_input_ids": torch.tensor([[7, 20, 21, 22]]),
    "labels": torch.tensor([[20, 21, 22, 23]]),
}


def test_given_ids_are_fed_and_their_labels_predicted():
    mask = torch.tensor([[1, 1, 1, 0]])
    pairs = sequence_pairs({**GIVEN, "decoder_attention_mask": mask}, CONFIG)
    assert pairs.inputs.keys() == {"input_ids", "decoder_input_ids", "decoder_attention_mask"}
    assert pairs.inputs["decoder_input_ids"].tolist() == [[7, 20, 21, 22]]
    assert pairs.targets.tolist() == [[20, 21, 22, NONE]]


SHORT = torch.tensor([[20, 21]])


@pytest.mark.parametrize(
    ("batch", "rule"),
    [
        ({**GIVEN, "labels": None}, r"with decoder_input_ids must have labels.*none"),
        (
            {**GIVEN, "labels": SHORT},
            r"labels must have the shape of decoder_input_ids, \(1, 4\); got \(1, 2\)",
        ),
        (
            {**GIVEN, "decoder_attention_mask": SHORT},
            r"decoder_attention_mask must have .* decoder_input_ids, \(1, 4\); got \(1, 2\)",
        ),
        (
            {"input_ids": SHORT, "decoder_attention_mask": SHORT},
            "must come with the decoder_input_ids",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(batch, rule):
    with pytest.raises(ValueError, match=rule):
        sequence_pairs(batch, CONFIG)


@pytest.fixture(scope="module")
def florence():
    return tiny_model(FLORENCE.model_type, FLORENCE.changes).eval()


@pytest.fixture(scope="module")
def answered(florence):
    batch = make_batch(FLORENCE, florence)
    labels = torch.full_like(batch["input_ids"], NONE)
    labels[:, -4:] = batch["input_ids"][:, -4:]
    return {**batch, "labels": labels}


def test_florence_perplexity_is_that_of_the_models_own_loss(florence, answered):
    read = answered["attention_mask"].clone()
    read[:, -4:] = 0
    inputs = {**answered, "attention_mask": read, "labels": answered["labels"][:, -4:]}
    with torch.no_grad():
        loss = float(florence(**inputs).loss)
    assert has.perplexity(florence, [answered]) == pytest.approx(math.exp(loss), rel=1e-5)


def test_florence_given_ids_are_scored_as_they_are(florence, answered):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(100, 160, (1, 6), generator=generator)
    fed = torch.cat([torch.ones_like(labels[:, :1]), labels[:, :-1]], dim=1)
    batch = {**answered, "decoder_input_ids": fed, "labels": labels}
    with torch.no_grad():
        loss = float(florence(**batch).loss)
    assert has.perplexity(florence, [batch]) == pytest.approx(math.exp(loss), rel=1e-5)


def test_florence_the_cache_quantises_what_the_decoder_stores(florence, answered):
    profile = has.KVCacheConfig(bits=2, group_size=4, residual_length=4)
    cache = new_cache(florence, profile)
    assert isinstance(cache.self_attention_cache, AdaptiveQuantizedCache)
    assert has.perplexity(florence, [answered], profile) != has.perplexity(
        florence, [answered], False
    )


def statistics_of(model, batch):
    with collect_inputs(prunable_weights(model)) as statistics:
        statistics.token_weights = token_weights(batch, model.config)
        statistics.encoder_weights = encoder_weights(batch, model.config)
        run_decoder(model, batch, stop_after=decoder_layers(model)[1])
    return statistics


LAYER = "model.language_model.decoder.layers.0"


def counts(model, batch):
    statistics = statistics_of(model, batch)
    names = ("self_attn.q_proj", "encoder_attn.q_proj", "encoder_attn.k_proj", "fc1")
    return {name: statistics.statistic(f"{LAYER}.{name}").tokens for name in names}


def test_florence_calibration_sees_what_is_predicted_and_what_is_read(florence, answered):
    assert counts(florence, answered) == {
        "self_attn.q_proj": 4,
        "encoder_attn.q_proj": 4,
        "encoder_attn.k_proj": answered["input_ids"].shape[1] - 4,
        "fc1": 4,
    }


@pytest.mark.parametrize("predicted", [5, 8])
def test_padding_and_lengths_that_are_alike_mislead_no_statistic(florence, predicted):
    ids, fed = torch.randint(100, 160, (2, 8)), torch.randint(100, 160, (2, 8))
    labels = fed.clone()
    labels[:, predicted:] = NONE
    labels[1, 2:] = NONE
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": fed, "labels": labels}
    assert counts(florence, batch) == {
        "self_attn.q_proj": predicted + 2,
        "encoder_attn.q_proj": predicted + 2,
        "encoder_attn.k_proj": 5 + 8,
        "fc1": predicted + 2,
    }


def test_what_cross_attention_reads_is_that_of_the_rows_by_themselves(florence):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 160, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    rows = [{"input_ids": ids[:1, :8]}, {"input_ids": ids[1:]}]
    name = f"{LAYER}.encoder_attn.v_proj"
    together = statistics_of(florence, {"input_ids": ids, "attention_mask": mask})
    apart = [statistics_of(florence, row).input_norm(name) for row in rows]
    torch.testing.assert_close(together.input_norm(name), torch.stack(apart).norm(dim=0))


@pytest.mark.parametrize("how", ["layer by layer", "ranked"])
def test_what_the_padding_is_does_not_matter(florence, how):
    ids = torch.randint(100, 160, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    removed = []
    for padding in (0, 120):
        batch = {"input_ids": ids.masked_fill(mask == 0, padding), "attention_mask": mask}
        if how == "ranked":
            ranking = rank_model(florence, [batch], low=0.4, high=0.6, progress=False)
            removed.append({name: found.mask(0.5) for name, found in ranking.items()})
        else:
            model = copy.deepcopy(florence)
            has.prune(model, has.SparsityConfig(metric="lognorm"), [batch])
            removed.append({n: w.weight == 0 for n, w in prunable_weights(model).items()})
    assert all(torch.equal(found, removed[1][name]) for name, found in removed[0].items())


def test_merged_attention_makes_keys_of_what_both_parts_read():
    """T5Gemma2 hands each key and value projection the decoder's tokens, then the encoder's."""
    model = tiny_model("t5gemma2")
    ids = torch.randint(100, 160, (2, 12), generator=torch.Generator().manual_seed(0))
    statistics = statistics_of(model, {"input_ids": ids})
    query, key, value = (
        statistics.statistic(f"model.decoder.layers.0.self_attn.{name}_proj") for name in "qkv"
    )
    assert (query.tokens, key.tokens) == (2 * 6, 2 * 12)
    assert key is value
    report = has.prune(model, has.SparsityConfig(metric="alps"), [{"input_ids": ids}])
    assert report.mean_sparsity == 0.5


def test_florence_search(florence, answered):
    space = has.SearchSpace(kv_group_size=4, kv_residual_length=4)
    found = has.search(florence, [answered], [answered] * 2, space, n_trials=2, progress=False)
    assert math.isfinite(found.best_value)


def test_an_encoder_of_features_is_given_what_the_decoder_reads(tiny_whisper):
    fed = torch.randint(3, 128, (2, 10))
    batch = {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": fed, "labels": fed}
    assert has.prune(tiny_whisper, has.SparsityConfig(metric="wanda"), [batch]).mean_sparsity == 0.5
    expected = tiny_whisper(**batch).loss.exp()
    assert has.perplexity(tiny_whisper, [batch]) == pytest.approx(float(expected), rel=1e-4)


OWN_LABELS = torch.tensor([[21, 22, 23, 24], [31, 32, NONE, NONE]])


@pytest.mark.parametrize("width", [12, 4])
def test_labels_that_repeat_no_input_are_those_of_the_decoder(florence, width):
    ids = torch.randint(100, 160, (2, width), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": OWN_LABELS}
    assert has.perplexity(florence, [batch]) == pytest.approx(
        float(florence(**batch).loss.exp()), rel=1e-4
    )
    assert has.prune(florence, has.SparsityConfig(metric="wanda"), [batch]).mean_sparsity == 0.5


def test_labels_alone_tell_what_the_decoder_reads_beside_features(tiny_whisper, caplog):
    batch = {"input_features": torch.randn(2, 8, 32), "labels": OWN_LABELS}
    expected = float(tiny_whisper(**batch).loss.exp())
    assert has.perplexity(tiny_whisper, [batch]) == pytest.approx(expected, rel=1e-4)
    cache = has.KVCacheConfig(bits=8, group_size=4, residual_length=4)
    quantised = has.perplexity(tiny_whisper, [batch], cache)
    assert quantised == pytest.approx(expected, rel=0.05)
    assert quantised != expected
    assert not caplog.text
    assert has.prune(tiny_whisper, has.SparsityConfig(metric="wanda"), [batch]).mean_sparsity == 0.5


def test_an_encoder_of_features_takes_no_tokens(tiny_whisper):
    batch = {"input_features": torch.randn(2, 8, 32), "input_ids": torch.ones(2, 10).long()}
    message = r"WhisperForConditionalGeneration reads no tokens.*has input_features, input_ids\."
    with pytest.raises(ValueError, match=message):
        has.prune(tiny_whisper, has.SparsityConfig(metric="wanda"), [batch])
    with pytest.raises(ValueError, match=message):
        has.perplexity(tiny_whisper, [batch])
