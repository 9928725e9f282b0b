from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from hf_adaptive_sparse.architecture import cache_argument
from hf_adaptive_sparse.calibration.processors import load_processor
from hf_adaptive_sparse.calibration.records import DataError
from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.evaluation import answering, vqa
from hf_adaptive_sparse.evaluation.answering import GeneratedAnswer, generate_answers
from hf_adaptive_sparse.evaluation.vqa import vqa_accuracy
from hf_adaptive_sparse.kvcache.cache import AdaptiveQuantizedCache
from hf_adaptive_sparse.profiles import KVCacheConfig
from tests.families.catalogue import FAMILIES
from tests.families.matrix import make_batch
from tests.families.tiny_models import tiny_model
from tests.processors import make_llava_processor, make_tokenizer


def rows(count: int = 5) -> list[dict[str, object]]:
    return [
        {
            "image": Image.new("RGB", (16, 16), (40 * i, 0, 255 - 40 * i)),
            "question": "what is it" + ", please" * i + "?",
            "answer": "yes",
        }
        for i in range(count)
    ]


def answers_are(monkeypatch: pytest.MonkeyPatch, *answers: GeneratedAnswer) -> None:
    """Let the model say these things."""
    left = list(answers)
    monkeypatch.setattr(
        vqa, "generate_answers", lambda m, p, chunk, **_: [left.pop(0) for _ in chunk]
    )


def spoken(text: str, ended: bool = True) -> GeneratedAnswer:
    ids = make_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return GeneratedAnswer(text.strip(), tuple(ids), ended)


def test_batch_size_changes_no_answer(tiny_llava) -> None:
    processor = make_llava_processor()
    data = rows()
    for layer in tiny_llava.model.language_model.layers:  # so that the answers differ
        layer.self_attn.v_proj.weight.data *= 40
    answers = [[a.text for a in generate_answers(tiny_llava, processor, [row])] for row in data]
    expected = tuple(text for row in answers for text in row)
    assert len(set(expected)) > 1
    for size in (1, 2, 5):
        result = vqa_accuracy(tiny_llava, processor, data, batch_size=size, keep_predictions=True)
        assert result.predictions == expected
    assert processor.tokenizer.padding_side == make_tokenizer().padding_side


@pytest.mark.parametrize("kv_cache", [None, False, KVCacheConfig(bits=4, residual_length=2)])
def test_an_encoder_decoder_answers_with_what_its_decoder_says(kv_cache, monkeypatch) -> None:
    family = next(family for family in FAMILIES if family.model_type == "florence2")
    model = tiny_model(family.model_type, family.changes).eval()
    model.config.quantization_config = SparsityConfig(target_sparsity=0, kv_cache=8)
    batch = make_batch(family, model)
    monkeypatch.setattr(answering, "encode_questions", lambda *_: batch)
    (answer,) = generate_answers(
        model, make_tokenizer(), rows(1), kv_cache=kv_cache, max_new_tokens=5
    )
    assert len(answer.ids) == 5 or answer.ended
    if kv_cache is False:
        del model.config.quantization_config
        settings = answering._greedy(model, make_tokenizer(), 5)
        said = model.generate(**batch, generation_config=settings)[0, 1:].tolist()
        assert list(answer.ids) == said[: len(answer.ids)]


def test_greedy_whatever_the_generation_config_says(tiny_llava) -> None:
    processor = make_llava_processor()
    expected = generate_answers(tiny_llava, processor, rows(2), max_new_tokens=4)
    tiny_llava.generation_config.do_sample = True
    tiny_llava.generation_config.temperature = 50.0
    tiny_llava.generation_config.num_beams = 3
    tiny_llava.train()
    assert generate_answers(tiny_llava, processor, rows(2), max_new_tokens=4) == expected
    assert tiny_llava.generation_config.do_sample
    assert tiny_llava.training


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 50.0},
        {"no_repeat_ngram_size": 1},
        {"num_return_sequences": 2, "num_beams": 2},
        {"sequence_bias": [[[7], 1e4]]},
        {"return_dict_in_generate": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_likeliest_token_whatever_the_generation_config_prefers(tiny_llava, settings) -> None:
    processor, own = make_llava_processor(), tiny_llava.generation_config
    expected = generate_answers(tiny_llava, processor, rows(2), max_new_tokens=4)
    own.update(**settings)
    assert generate_answers(tiny_llava, processor, rows(2), max_new_tokens=4) == expected
    assert tiny_llava.generation_config is own


@pytest.mark.parametrize("name", ["min_new_tokens", "min_length"])
def test_an_answer_may_end_at_once(tiny_llava, name) -> None:
    processor, own = make_llava_processor(), tiny_llava.generation_config
    said = generate_answers(tiny_llava, processor, rows(1), max_new_tokens=4)
    own.update(eos_token_id=said[0].ids[0], **{name: 1000})
    assert generate_answers(tiny_llava, processor, rows(1)) == [GeneratedAnswer("", (), True)]


def test_answers_stop_at_the_end_of_sequence_and_the_first_newline(tiny_llava, monkeypatch) -> None:
    processor = make_llava_processor()
    tokenizer = processor.tokenizer
    said = [" no</s>yes", " a\nQ: b", "\n x"]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in said]
    width = max(map(len, ids))
    tail = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    monkeypatch.setattr(
        tiny_llava,
        "generate",
        lambda input_ids, **_: torch.cat([input_ids, tail], dim=1),
        raising=False,
    )
    answers = generate_answers(tiny_llava, processor, rows(3))
    assert [a.text for a in answers] == ["no", "a", "x"]
    assert [a.ended for a in answers] == [True, False, False]
    assert tokenizer.decode(answers[0].ids) == " no"


def test_accuracy(tiny_llava, monkeypatch) -> None:
    answers_are(monkeypatch, *map(spoken, ("Yes.", "no", "the yes", "yes it is", "")))
    result = vqa_accuracy(tiny_llava, make_llava_processor(), rows(), batch_size=2, progress=True)
    assert (result.accuracy, result.count) == (pytest.approx(2 / 5), 5)
    assert (result.match, result.ended_ratio) == ("whole", 1.0)
    assert result.seconds > 0
    assert result.predictions is None


def test_ten_answers(tiny_llava, monkeypatch) -> None:
    answers_are(monkeypatch, spoken("two"))
    row = rows(1)[0] | {"answers": ["2"] * 3 + ["3"] * 7}
    result = vqa_accuracy(tiny_llava, make_llava_processor(), [row])
    assert result.accuracy == pytest.approx(0.9)


class TestPrefix:
    """Models that were never taught to end an answer."""

    said = (" yes yes no", " no yes", " yesterday")

    def run(self, model, monkeypatch, ended: bool = False, **settings: object):
        answers_are(monkeypatch, *(spoken(text, ended) for text in self.said))
        return vqa_accuracy(model, make_llava_processor(), rows(3), **settings)

    def test_first_tokens_count(self, tiny_llava, monkeypatch) -> None:
        result = self.run(tiny_llava, monkeypatch, match="prefix")
        assert result.accuracy == pytest.approx(2 / 3)

    def test_chosen_where_no_answer_ends(self, tiny_llava, monkeypatch) -> None:
        result = self.run(tiny_llava, monkeypatch)
        assert (result.match, result.accuracy) == ("prefix", pytest.approx(2 / 3))

    def test_not_chosen_otherwise(self, tiny_llava, monkeypatch) -> None:
        assert self.run(tiny_llava, monkeypatch, ended=True).match == "whole"
        result = self.run(tiny_llava, monkeypatch, match="whole")
        assert (result.match, result.accuracy) == ("whole", 0.0)

    def test_generates_no_more_than_it_compares(self, tiny_llava, monkeypatch) -> None:
        seen = []
        original = vqa.generate_answers
        monkeypatch.setattr(
            vqa,
            "generate_answers",
            lambda *a, **k: seen.append(k["max_new_tokens"]) or original(*a, **k),
        )
        vqa_accuracy(tiny_llava, make_llava_processor(), rows(1), match="prefix")
        assert seen == [len(" yes")]


class TestCache:
    def used(self, model, monkeypatch, kv_cache) -> object:
        caches = []

        def note(module, args, kwargs) -> None:
            caches.append(kwargs.get(cache_argument(module)))

        with model.register_forward_pre_hook(note, with_kwargs=True):
            generate_answers(model, make_llava_processor(), rows(1), kv_cache=kv_cache)
        return caches[0]

    def test_explicit_profile(self, tiny_llava, monkeypatch) -> None:
        cache = self.used(tiny_llava, monkeypatch, KVCacheConfig(bits=4))
        assert isinstance(cache, AdaptiveQuantizedCache)
        assert cache.kv_cache.bits == 4

    def test_models_own_profile_and_false(self, tiny_llava, monkeypatch) -> None:
        from hf_adaptive_sparse.kvcache.generation import install

        install()
        tiny_llava.config.quantization_config = {
            "quant_method": "adaptive_sparse",
            "kv_cache": {"key_bits": 4, "value_bits": 6},
        }
        cache = self.used(tiny_llava, monkeypatch, None)
        assert isinstance(cache, AdaptiveQuantizedCache)
        assert not isinstance(self.used(tiny_llava, monkeypatch, False), AdaptiveQuantizedCache)


def test_errors(tiny_llava, tiny_llama) -> None:
    processor = make_llava_processor()
    with pytest.raises(ValueError, match="LlamaForCausalLM takes none"):
        vqa_accuracy(tiny_llama, processor, rows())
    with pytest.raises(ValueError, match="must have an image processor"):
        vqa_accuracy(tiny_llava, make_tokenizer(), rows())
    with pytest.raises(DataError, match="has text"):
        vqa_accuracy(tiny_llava, processor, [{"text": "x"}])
    with pytest.raises(ValueError, match="match must be"):
        vqa_accuracy(tiny_llava, processor, rows(), match="fuzzy")  # type: ignore[arg-type]
    for setting in ({"batch_size": 0}, {"max_new_tokens": 0}, {"num_samples": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(setting))} must be a whole number"):
            vqa_accuracy(tiny_llava, processor, rows(), **setting)


@pytest.mark.shared_data
def test_trained_model_answers(shared_dir: Path) -> None:
    folder = shared_dir / "models/tiny-llava"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    data = shared_dir / "data/easy-vqa/evaluation.parquet"
    result = vqa_accuracy(model, load_processor(folder), data, num_samples=64)
    assert result.accuracy > 0.95
