"""Front layers that are skipped: same logits bit for bit, within a bound, or not at all."""

from __future__ import annotations

import pytest
import torch
import transformers

from hf_adaptive_sparse.evaluation.reuse import HiddenStateStore, ReusingModel, starting_at
from hf_adaptive_sparse.evaluation.scoring import predict
from hf_adaptive_sparse.profiles import KVCacheConfig

LAYERS = 4


def kv_profile(bits):
    return KVCacheConfig(bits=tuple(bits), group_size=16, residual_length=8)


def scaled(model, layer, factor):
    model.model.layers[layer].mlp.down_proj.weight.data.mul_(factor)


class TestLogits:
    @pytest.mark.parametrize("changed", [0, 1, 2, 3])
    def test_a_changed_layer_is_run_anew_and_nothing_else_differs(
        self, tiny_llama, text_batches, changed
    ):
        reusing = ReusingModel(tiny_llama)
        reusing.predict(0, text_batches[0], False, ["a"] * LAYERS)
        reusing.predict(0, text_batches[0], False, ["a"] * LAYERS)  # the comparison
        settings = ["a"] * LAYERS
        settings[changed] = "b"
        scaled(tiny_llama, changed, 1.5)
        before = reusing.layers_run, reusing.layers_skipped
        found = reusing.predict(0, text_batches[0], False, settings)
        plain = predict(tiny_llama, text_batches[0], False)
        assert torch.equal(found.logits, plain.logits)
        assert reusing.layers_skipped - before[1] == changed
        assert reusing.layers_run - before[0] == LAYERS - changed

    def test_kv_bits_of_the_layers_that_run_count(self, tiny_llama, text_batches):
        reusing = ReusingModel(tiny_llama)
        profiles = [(8, 8, 8, 8), (8, 8, 2, 8), (8, 2, 2, 8), (8, 2, 2, 2), (8, 8, 2, 8)]
        for bits in profiles:
            kv_cache = kv_profile(bits)
            found = reusing.predict(0, text_batches[0], kv_cache, bits)
            plain = predict(tiny_llama, text_batches[0], kv_cache)
            assert torch.equal(found.logits, plain.logits), bits
        assert reusing.layers_skipped > 0

    def test_images_reach_the_layers_that_run(self, tiny_llava, image_batches):
        reusing = ReusingModel(tiny_llava)
        for settings in ("aaaa", "aaaa", "aaba"):
            found = reusing.predict(0, image_batches[0], False, settings)
            assert torch.equal(found.logits, predict(tiny_llava, image_batches[0], False).logits)
        assert reusing.layers_skipped == 0 + 3 + 2

    def test_batches_are_kept_apart(self, tiny_llama, text_batches):
        reusing = ReusingModel(tiny_llama)
        for _ in range(2):
            for index, batch in enumerate(text_batches[:2]):
                found = reusing.predict(index, batch, False, "aaaa")
                assert torch.equal(found.logits, predict(tiny_llama, batch, False).logits)

    def test_what_nothing_is_scored_in_stays_none(self, tiny_llama):
        reusing = ReusingModel(tiny_llama)
        assert (
            reusing.predict(0, {"input_ids": torch.ones(1, 1, dtype=torch.long)}, False, "aaaa")
            is None
        )

    def test_the_model_is_as_before(self, tiny_llama, text_batches):
        own = [dict(vars(layer)) for layer in tiny_llama.model.layers]
        hooks = [len(layer._forward_pre_hooks) for layer in tiny_llama.model.layers]
        reusing = ReusingModel(tiny_llama)
        for settings in ("aaaa", "aaaa", "aaba"):
            reusing.predict(0, text_batches[0], False, settings)
        assert [dict(vars(layer)).keys() for layer in tiny_llama.model.layers] == [
            o.keys() for o in own
        ]
        assert [len(layer._forward_pre_hooks) for layer in tiny_llama.model.layers] == hooks

    def test_an_exception_leaves_the_layers_as_they_were(self, tiny_llama):
        layers = list(tiny_llama.model.layers)
        wrapped = layers[0].forward
        layers[0].forward = wrapped  # as accelerate does
        with pytest.raises(KeyError), starting_at(layers, 2, torch.zeros(1, 1, 64)):
            raise KeyError
        assert layers[0].forward is wrapped
        assert "forward" not in vars(layers[1])


class TestModelsThatCannot:
    def test_other_logits_switch_it_off(self, tiny_llama, text_batches, monkeypatch):
        # A layer whose work leaks past its hidden states, as a cache shared between layers does.
        layers = tiny_llama.model.layers
        original = type(layers[0]).forward
        runs = []

        def leaking(self, *args, **kwargs):
            hidden = original(self, *args, **kwargs)
            if self is layers[0]:
                runs.append(1)
            return hidden + (0.25 if self is layers[3] and runs and runs.pop() else 0.0)

        monkeypatch.setattr(type(layers[0]), "forward", leaking)
        reusing = ReusingModel(tiny_llama)
        for settings in ("aaaa", "aaba", "aaab"):
            found = reusing.predict(0, text_batches[0], False, settings)
            assert torch.equal(found.logits, predict(tiny_llama, text_batches[0], False).logits)
        assert reusing.layers_skipped == 0

    def test_an_error_switches_it_off(self, tiny_llama, text_batches, monkeypatch):
        layers = tiny_llama.model.layers
        original = type(layers[0]).forward
        seen = []

        def sharing(self, *args, **kwargs):
            if self is layers[0]:
                seen.append(1)
            if self is layers[3]:
                seen.pop()  # nothing to share where the first layer did not run
            return original(self, *args, **kwargs)

        monkeypatch.setattr(type(layers[0]), "forward", sharing)
        reusing = ReusingModel(tiny_llama)
        for _ in range(3):
            found = reusing.predict(0, text_batches[0], False, "aaaa")
        assert torch.equal(found.logits, predict(tiny_llama, text_batches[0], False).logits)

    def test_layers_that_share_earlier_keys_and_values(self):
        # Layers 5 to 7 read what layers 3 and 4 stored: no forward may begin behind layer 3.
        transformers.set_seed(0)
        config = transformers.Gemma3nTextConfig(
            vocab_size=128,
            vocab_size_per_layer_input=128,
            hidden_size=32,
            hidden_size_per_layer_input=16,
            intermediate_size=[64] * 8,
            num_hidden_layers=8,
            num_kv_shared_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            layer_types=["sliding_attention", "full_attention"] * 4,
            activation_sparsity_pattern=[0.0] * 8,
            altup_num_inputs=2,
            laurel_rank=8,
        )
        model = transformers.Gemma3nForCausalLM(config).eval()
        batch = {"input_ids": torch.randint(5, 120, (2, 24))}
        plain = predict(model, batch, False)
        reusing = ReusingModel(model)
        skipped = {}
        for changed in range(8):
            settings = ["a"] * 8
            settings[changed] = "b"
            reusing.predict(0, batch, False, "aaaaaaaa")
            before = reusing.layers_skipped
            found = reusing.predict(0, batch, False, settings)
            assert torch.equal(found.logits, plain.logits), changed
            skipped[changed] = reusing.layers_skipped - before
        assert skipped == dict(enumerate([0, 1, 2, 3, 3, 3, 3, 3]))


class TestBound:
    def test_the_bytes_held_never_exceed_the_limit(self, tiny_llama, text_batches):
        one = 2 * 32 * 64 * 4  # batch x seq x hidden x float32
        reusing = ReusingModel(tiny_llama, limit_bytes=int(4.5 * one))
        for round_ in range(3):
            for index, batch in enumerate(text_batches):
                reusing.predict(index, batch, False, [f"{round_}"] * LAYERS)
                assert reusing.store.nbytes <= reusing.store.limit_bytes
                assert reusing.store.nbytes == sum(t.nbytes for t in reusing.store._kept.values())
        assert reusing.store.nbytes == 4 * one

    def test_none_are_kept_without_a_budget(self, tiny_llama, text_batches):
        reusing = ReusingModel(tiny_llama, limit_bytes=0)
        for _ in range(2):
            reusing.predict(0, text_batches[0], False, "aaaa")
        assert (reusing.store.nbytes, reusing.layers_skipped) == (0, 0)

    def test_only_the_boundaries_asked_for_are_kept(self, tiny_llama, text_batches):
        reusing = ReusingModel(tiny_llama, boundaries=[2])
        reusing.predict(0, text_batches[0], False, "aaaa")
        assert reusing.store.nbytes == 2 * 32 * 64 * 4

    def test_the_least_recently_used_goes_first(self):
        store = HiddenStateStore(limit_bytes=8)
        for key in "ab":
            store.put(key, torch.zeros(1))
        store.get("a")
        store.put("c", torch.zeros(1))
        assert ["a" in store, "b" in store, "c" in store] == [True, False, True]
        store.put("d", torch.zeros(3))
        assert "d" not in store

    def test_a_copy_is_kept(self):
        store = HiddenStateStore(limit_bytes=8)
        hidden = torch.ones(2)
        store.put("a", hidden)
        hidden.zero_()
        assert store.get("a").tolist() == [1, 1]
