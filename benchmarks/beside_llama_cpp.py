"""How fast does llama.cpp decode the same billion parameters, in 8 bits and dense?

For information: llama.cpp reads all weights in 8 bits, ours half of them and a bitmask, on the same
processor with as many threads. The model is that of `sparse_runtime.py`; its weights are random and
written to GGUF as Q8_0, the embedding included. Each keeps its own cache of the context (16 bits in
llama.cpp, a mean of 7 in ours), and all take turns, one token each per round.

Needs ``llama-cpp-python`` and ``gguf``, which build from source where there is no wheel. Its AMX
path crashed where this was first run; ``--plain-buffers`` leaves it out, and with it the weights
that llama.cpp repacks.

    python benchmarks/beside_llama_cpp.py [--layers 22] [--context 2048] [--rounds 24]
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch
from environment import describe, write_result
from sparse_runtime import FORMS, decoder, load, model_config, write_models
from transformers import LlamaConfig
from turns import WARM_UP, in_turns

from hf_adaptive_sparse.report import markdown_table

REST_SECONDS = 0.02
"""Between turns: llama.cpp's threads go on looking for work for a moment."""


def gguf_tensors(config: LlamaConfig, seed: int) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield llama.cpp's names and random weights, float32."""
    generator = np.random.default_rng(seed)
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * config.head_dim
    shapes = {
        "attn_q": (hidden, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }

    def normal(rows: int, columns: int) -> np.ndarray[Any, Any]:
        weight = generator.standard_normal((rows, columns), dtype=np.float32)
        return weight / np.float32(columns**0.5)

    yield "token_embd.weight", normal(config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        for name, shape in shapes.items():
            yield f"blk.{layer}.{name}.weight", normal(*shape)
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{name}.weight", np.ones(hidden, dtype=np.float32)
    yield "output_norm.weight", np.ones(hidden, dtype=np.float32)


def write_gguf(path: Path, config: LlamaConfig, seed: int) -> None:
    """Write a model without a tokenizer: tokens go in and come out as numbers."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, weight in gguf_tensors(config, seed):
        if weight.ndim == 1:
            writer.add_tensor(name, weight)
        else:
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextlib.contextmanager
def plain_buffers() -> Iterator[None]:
    """Load models without llama.cpp's extra buffers; its class `Llama` has no argument for it."""
    default = llama_cpp.llama_cpp.llama_model_default_params

    def without() -> Any:
        parameters = default()
        parameters.use_extra_bufts = False
        return parameters

    llama_cpp.llama_cpp.llama_model_default_params = without
    try:
        yield
    finally:
        llama_cpp.llama_cpp.llama_model_default_params = default


def llama_step(path: Path, config: LlamaConfig, context: int, room: int) -> Callable[[], object]:
    """Return what decodes one token behind the context."""
    threads = torch.get_num_threads()
    model = llama_cpp.Llama(
        str(path),
        n_ctx=context + room,
        n_batch=512,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    generator = np.random.default_rng(1)
    model.eval(generator.integers(config.vocab_size, size=context).tolist())
    return lambda: model.eval([5])


def table(result: dict[str, Any]) -> str:
    own = f"llama.cpp, Q8_0 (llama-cpp-python {result['llama_cpp_python']})"
    reference = result["milliseconds"][own]
    rows = [
        {
            "form": name,
            "weights": f"{result['bytes'][name] / 1e6:,.0f} MB",
            "decode ms": f"{found:.1f}",
            "tokens per second against llama.cpp": f"{reference / found:.2f} x",
        }
        for name, found in result["milliseconds"].items()
    ]
    plain = ", which runs without its AMX buffers" if result["plain_buffers"] else ""
    return (
        "# Decoding a billion parameters, beside llama.cpp\n\n"
        f"Random Llama of 0.97 B decoder parameters, {result['context']:,} tokens of context, "
        f"{result['environment']['threads']} threads of {result['environment']['processor']}; "
        f"medians of {result['rounds']} rounds in turns. Ours are half zeros; the embedding is "
        f"bfloat16 in ours and 8 bits in llama.cpp's{plain}.\n\n" + markdown_table(rows)
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain-buffers", action="store_true", help="of llama.cpp, see above")
    options = parser.parse_args()
    config = model_config("1b", options.layers)
    own = f"llama.cpp, Q8_0 (llama-cpp-python {version('llama-cpp-python')})"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder, model_config("1b", options.layers), options.seed)
        write_gguf(folder / "model.gguf", config, options.seed)
        steps = {form: decoder(load(folder, form), form, config, options.context) for form in FORMS}
        with plain_buffers() if options.plain_buffers else contextlib.nullcontext():
            steps[own] = llama_step(
                folder / "model.gguf", config, options.context, room=options.rounds + WARM_UP
            )
        sizes = {
            form: sum(file.stat().st_size for file in (folder / form).glob("*.safetensors"))
            for form in FORMS
        }
        sizes[own] = (folder / "model.gguf").stat().st_size
        seconds = in_turns(steps, options.rounds, rest_seconds=REST_SECONDS)
        found = {name: 1000 * statistics.median(taken) for name, taken in seconds.items()}
    result = {
        "seed": options.seed,
        "layers": options.layers,
        "context": options.context,
        "rounds": options.rounds,
        "plain_buffers": options.plain_buffers,
        "environment": describe(),
        "llama_cpp_python": version("llama-cpp-python"),
        "bytes": sizes,
        "milliseconds": found,
    }
    text = table(result)
    write_result("beside_llama_cpp", result, text)
    print(text)


if __name__ == "__main__":
    main()
