"""What do sparse weights and the packed cache buy a whole model of 7 billion parameters on a GPU?

A random Llama of LLaVA-1.5-7B's shape (32 layers, 4,096 wide, 32 heads of 128, bfloat16), half of
whose weights are gone. Its forms stay on the device side by side and take turns, so that whatever
else happens hits all alike: dense with ``DynamicCache``, dense with the adaptive cache, sparse with
values of 16, 8 and 4 bits and the adaptive cache. Per form: bytes of model and cache, time of a
prompt, and time per token behind it as ``generate()`` spends it, Python included, and on the device
alone (by torch's profiler: the sum of its kernels). With ``--graphs`` dense and sparse weights also
decode as ``generate(..., cache_implementation="static")`` does: compiled, one CUDA graph per token,
which leaves Python nothing to do between the kernels. Compiling takes about a minute per form.

    python benchmarks/gpu_model.py [--layers 32] [--context 2048] [--rounds 24] [--graphs]

Writes ``results/gpu_model.json``, or ``gpu_model_graphs.json`` with ``--graphs``.
``TRITON_INTERPRET=1 python benchmarks/gpu_model.py --rehearse`` walks through the script on the CPU
and writes nothing.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable
from typing import Any

import gpu
import torch
from environment import write_result
from kv_bytes import stock_nbytes
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

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
GRAPHS = "static cache, graphs"


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

    def make_cache(self) -> Any:
        """Return an empty cache of this form."""
        return make_cache(self.name, self.model.config)

    def step(self) -> None:
        """Decode one token."""
        self.forward(self.model, self.prompt[:, :1])

    def forward(self, function: Callable[..., Any], ids: torch.Tensor, **inputs: Any) -> None:
        """Pass tokens ``(batch, n)`` through the model, or what it was compiled to."""
        cache = {cache_argument(self.model): self.cache}
        function(input_ids=ids, logits_to_keep=1, **cache, **inputs)

    def prefill(self) -> None:
        """Time the prompt, with a new cache."""
        self.cache = self.make_cache()
        prompt = self.prompt
        self.prefills.append(
            gpu.milliseconds(prompt.device, lambda: self.forward(self.model, prompt))
        )

    def decode(self) -> None:
        """Time one token behind it."""
        self.decodes.append(gpu.milliseconds(self.prompt.device, self.step))

    def kernel_ms(self) -> float:
        """Return what the kernels of one token take."""
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            gpu.milliseconds(self.prompt.device, self.step)
        return float(sum(event.device_time_total for event in profile.events())) / 1000


class GraphForm(Form):
    """A form whose step is compiled and recorded, with a cache of fixed size.

    Args:
        form: The form with the same model.
        spare: Tokens that the cache has room for behind the prompt.
        settings: Of ``torch.compile``.
    """

    def __init__(self, form: Form, spare: int, **settings: Any) -> None:
        weights = form.name.removesuffix(", adaptive cache")
        super().__init__(f"{weights}, {GRAPHS}", form.model, form.prompt)
        self.spare = spare
        self.compiled = torch.compile(form.model.forward, fullgraph=True, **settings)

    def make_cache(self) -> Any:
        """Return a cache of the size that the graph is recorded for."""
        return StaticCache(self.model.config, max_cache_len=self.prompt.shape[1] + self.spare)

    def prefill(self) -> None:
        """Time the prompt, which is not compiled: only the step is."""
        super().prefill()
        self.position = torch.full_like(self.prompt[:, :1], self.prompt.shape[1])

    def step(self) -> None:
        """Decode one token by what was recorded."""
        self.forward(self.compiled, self.prompt[:, :1].clone(), position_ids=self.position)
        self.position += 1


@torch.no_grad()
def measure(forms: list[Form], rounds: int, warm_up: int, device: torch.device) -> None:
    for number in range(6):
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


def cache_bytes(cache: Any) -> int:
    own: int | None = getattr(cache, "nbytes", None)
    return stock_nbytes(cache) if own is None else own


def rows_of(forms: list[Form], device: torch.device) -> list[dict[str, Any]]:
    return [
        {
            "form": form.name,
            "model_bytes": form.model.get_memory_footprint(),
            "cache_bytes": cache_bytes(form.cache),
            "prefill_ms": min(form.prefills),
            "decode_ms": statistics.median(form.decodes),
            "kernels_ms": form.kernel_ms() if device.type == "cuda" else None,
        }
        for form in forms
    ]


def table(result: dict[str, Any]) -> str:
    dense_ms: dict[bool, float] = {}  # in a graph or not: compared is like with like
    for row in result["rows"]:
        dense_ms.setdefault(_is_graph(row), row["decode_ms"])
    rows = [
        {
            "form": row["form"],
            "weights": f"{row['model_bytes'] / 1e9:.2f} GB",
            "cache": f"{row['cache_bytes'] / 1e6:,.0f} MB",
            "prompt": f"{row['prefill_ms']:.0f} ms",
            "token": f"{row['decode_ms']:.2f} ms",
            "as fast as dense": f"{dense_ms[_is_graph(row)] / row['decode_ms']:.2f} x",
            "its kernels": "" if row["kernels_ms"] is None else f"{row['kernels_ms']:.2f} ms",
        }
        for row in result["rows"]
    ]
    compared = " Graphs are compared with that of dense weights." if True in dense_ms else ""
    return (
        f"Random Llama of LLaVA-1.5-7B's shape, {result['layers']} layers, half of its weights "
        f"gone, bfloat16; prompt and context of {result['context']:,} tokens, batch "
        f"{result['batch']}; forms in turns.{compared}\n\n{markdown_table(rows)}"
        + "\n".join(["", *result.get("notes", [])])
    )


def _is_graph(row: dict[str, Any]) -> bool:
    return str(row["form"]).endswith(GRAPHS)


@torch.no_grad()
def main() -> int:
    parser = gpu.parser(__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--graphs", action="store_true", help="also compiled, in CUDA graphs")
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
    warm_up = min(options.rounds, 4)
    if options.graphs:
        how = {"backend": "aot_eager"} if options.rehearse else {"mode": "reduce-overhead"}
        spare = options.rounds + warm_up + 1
        forms += [GraphForm(form, spare, **how) for form in forms if form.name != ADAPTIVE]
    measure(forms, options.rounds, warm_up, device)
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
        name = "gpu_model_graphs" if options.graphs else "gpu_model"
        write_result(name, result, table(result))
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
