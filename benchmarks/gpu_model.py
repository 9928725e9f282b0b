"""What do sparse weights and the packed cache buy a whole model of 7 billion parameters on a GPU?

A random Llama of LLaVA-1.5-7B's shape (32 layers, 4,096 wide, 32 heads of 128, bfloat16), half of
whose weights are gone. Its forms stay on the device side by side and take turns, so that whatever
else happens hits all alike: dense with ``DynamicCache``, dense with the adaptive cache, sparse with
values of 16, 8 and 4 bits and the adaptive cache. Per form: bytes of model and cache, time of a
prompt, and time per token behind it as ``generate()`` spends it, Python included, and on the device
alone (by torch's profiler: the sum of its kernels).

    python benchmarks/gpu_model.py [--layers 32] [--context 2048] [--rounds 24]

Writes ``results/gpu_model.json``. ``TRITON_INTERPRET=1 python benchmarks/gpu_model.py --rehearse``
walks through the script on the CPU and writes nothing.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from typing import Any

import gpu
import torch
from environment import write_result
from kv_bytes import stock_nbytes
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import hf_adaptive_sparse as has
from hf_adaptive_sparse.architecture import cache_argument, prunable_weights
from hf_adaptive_sparse.packing.stored_weight import ValueFormat
from hf_adaptive_sparse.report import markdown_table
from hf_adaptive_sparse.runtime.conversion import compress_

SPARSE = {
    "sparse, 16 bits": ValueFormat(16),
    "sparse, 8 bits": ValueFormat(8, 128),
    "sparse, 4 bits": ValueFormat(4, 128),
}
PLAIN, ADAPTIVE = "dense", "dense, adaptive cache"


def make_models(
    config: LlamaConfig, device: torch.device, seed: int
) -> dict[str, LlamaForCausalLM]:
    """Return every form of one model, half of whose weights are gone."""
    torch.manual_seed(seed)
    with torch.device(device):
        dense = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        for linear in prunable_weights(dense).values():
            linear.weight.normal_(0.0, linear.in_features**-0.5)
            linear.weight.masked_fill_(torch.rand_like(linear.weight) < 0.5, 0.0)
    models = {PLAIN: dense, ADAPTIVE: dense}
    for form, stored in SPARSE.items():
        models[form] = copy.deepcopy(dense)
        compress_(models[form], dict.fromkeys(prunable_weights(dense), stored))
    return models


def make_cache(form: str, config: LlamaConfig) -> Any:
    if form == PLAIN:
        return DynamicCache(config=config)
    bits = tuple(8 if layer % 2 else 6 for layer in range(config.num_hidden_layers))
    return has.AdaptiveQuantizedCache(config, has.KVCacheConfig(bits=bits))


class Form:
    """One form of the model, and what its turns took."""

    def __init__(self, name: str, model: LlamaForCausalLM, prompt: torch.Tensor) -> None:
        self.name, self.model, self.prompt = name, model, prompt
        self.cache: Any = None
        self.prefills: list[float] = []
        self.decodes: list[float] = []

    def run(self, ids: torch.Tensor) -> float:
        """Return the milliseconds of one pass."""
        gpu.synchronise(ids.device)
        started = time.perf_counter()
        self.model(ids, logits_to_keep=1, **{cache_argument(self.model): self.cache})
        gpu.synchronise(ids.device)
        return 1000 * (time.perf_counter() - started)

    def prefill(self) -> None:
        """Time the prompt, with a new cache."""
        self.cache = make_cache(self.name, self.model.config)
        self.prefills.append(self.run(self.prompt))

    def decode(self) -> None:
        """Time one token behind it."""
        self.decodes.append(self.run(self.prompt[:, :1]))

    def kernel_ms(self) -> float:
        """Return what the kernels of one token take."""
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            self.run(self.prompt[:, :1])
        return sum(event.device_time_total for event in profile.events()) / 1000


@torch.inference_mode()
def measure(forms: list[Form], rounds: int, warm_up: int, device: torch.device) -> None:
    for number in range(3):
        for form in forms:
            form.prefill()
            if number == 0:
                form.prefills.clear()  # kernels were compiled
    for number in range(rounds + warm_up):
        for place in range(len(forms)):  # who follows whom changes from round to round
            form = forms[(place + number) % len(forms)]
            form.decode()
            if number < warm_up:
                form.decodes.clear()


def rows_of(forms: list[Form], device: torch.device) -> list[dict[str, Any]]:
    return [
        {
            "form": form.name,
            "model_bytes": form.model.get_memory_footprint(),
            "cache_bytes": stock_nbytes(form.cache) if form.name == PLAIN else form.cache.nbytes,
            "prefill_ms": min(form.prefills),
            "decode_ms": statistics.median(form.decodes),
            "kernels_ms": form.kernel_ms() if device.type == "cuda" else None,
        }
        for form in forms
    ]


def table(result: dict[str, Any]) -> str:
    dense = result["rows"][0]
    rows = [
        {
            "form": row["form"],
            "weights": f"{row['model_bytes'] / 1e9:.2f} GB",
            "cache": f"{row['cache_bytes'] / 1e6:,.0f} MB",
            "prompt": f"{row['prefill_ms']:.0f} ms",
            "token": f"{row['decode_ms']:.2f} ms",
            "as fast as dense": f"{dense['decode_ms'] / row['decode_ms']:.2f} x",
            "its kernels": "" if row["kernels_ms"] is None else f"{row['kernels_ms']:.2f} ms",
        }
        for row in result["rows"]
    ]
    return (
        f"Random Llama of LLaVA-1.5-7B's shape, {result['layers']} layers, half of its weights "
        f"gone, bfloat16; prompt and context of {result['context']:,} tokens, batch "
        f"{result['batch']}; forms in turns.\n\n{markdown_table(rows)}"
        + "\n".join(["", *result.get("notes", [])])
    )


@torch.inference_mode()
def main() -> int:
    parser = gpu.parser(__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=24)
    options = parser.parse_args()
    device = gpu.find_device(parser, options.rehearse)
    sizes = (4096, 11008, 32, 32000)
    if options.rehearse:
        sizes, options.layers, options.context, options.rounds = (64, 128, 2, 128), 2, 300, 2
    config = LlamaConfig(
        hidden_size=sizes[0],
        intermediate_size=sizes[1],
        num_hidden_layers=options.layers,
        num_attention_heads=sizes[2],
        vocab_size=sizes[3],
        max_position_embeddings=1 << 16,
    )
    models = make_models(config, device, options.seed)
    prompt = torch.randint(5, sizes[3], (options.batch, options.context), device=device)
    forms = [Form(name, model, prompt) for name, model in models.items()]
    measure(forms, options.rounds, min(options.rounds, 4), device)
    result: dict[str, Any] = {
        "question": "a whole model on a GPU: sparse weights and packed cache against dense",
        "seed": options.seed,
        "layers": options.layers,
        "context": options.context,
        "batch": options.batch,
        "rounds": options.rounds,
        "triton": gpu.triton_version(),
        "rows": rows_of(forms, device),
    }
    if not options.rehearse:
        write_result("gpu_model", result, table(result))
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
