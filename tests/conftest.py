"""Fixtures shared by all tests: tiny random models, and the data that lie beside the project."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # side by side, threads would wait for each other's cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

SHARED = Path(__file__).resolve().parents[2] / "shared"
DEMO_CHECKPOINT = Path(__file__).resolve().parents[1] / "hf_adaptive_sparse/demo/checkpoint"


def llama_config(**changes: object) -> LlamaConfig:
    """A Llama of a few kilobytes with grouped-query attention."""
    settings: dict[str, object] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaConfig(**(settings | changes))


def random_ids(batch: int = 1, tokens: int = 40, seed: int = 0) -> torch.Tensor:
    """``(batch, tokens)`` ids of text that all tiny models know."""
    return torch.randint(5, 128, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """A random Llama: 4 layers x 64, 4 heads over 2 key-value heads, tied embeddings, float32."""
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config()).eval()


@pytest.fixture
def tiny_llava() -> LlavaForConditionalGeneration:
    """A random LLaVA over the same text model; images of 16 x 16 become 4 tokens of id 4."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            projection_dim=32,
        ),
        text_config=llama_config(),
        image_token_index=4,
        image_seq_length=4,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config).eval()


@pytest.fixture
def tiny_whisper() -> WhisperForConditionalGeneration:
    """A random Whisper for sounds of 8 x 32 features; it suppresses no tokens."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=128,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=16,
        num_mel_bins=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return WhisperForConditionalGeneration(config).eval()


@pytest.fixture
def text_batches() -> list[dict[str, torch.Tensor]]:
    """Four batches of 2 x 32 random tokens; the first row of each is left-padded by 5."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(4):
        ids = torch.randint(5, 128, (2, 32), generator=generator)
        mask = torch.ones_like(ids)
        ids[0, :5], mask[0, :5] = 0, 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


@pytest.fixture
def image_batches() -> list[dict[str, torch.Tensor]]:
    """Three batches of 2 x (4 image + 12 text) tokens with their pixels, for ``tiny_llava``."""
    generator = torch.Generator().manual_seed(2)
    batches = []
    for _ in range(3):
        ids = torch.randint(5, 128, (2, 16), generator=generator)
        ids[:, 1:5] = 4
        batches.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "pixel_values": torch.randn(2, 3, 16, 16, generator=generator),
            }
        )
    return batches


@pytest.fixture
def shared_dir() -> Path:
    """The folder of evaluation data and models beside the project; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"the shared evaluation data are not beside the project ({SHARED.name}/)")
    return SHARED


@pytest.fixture
def demo_checkpoint() -> Path:
    """The bundled demo model."""
    return DEMO_CHECKPOINT
