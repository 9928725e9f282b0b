"""How much memory and time `prune` and `compress` take, in memory and with offloaded layers.

Writes a LLaVA-1.5-shaped checkpoint of random bfloat16 weights, shard by shard, prunes it in child
processes and reads what each of them used. ``--size 7b`` writes 14 GB and ``13b`` 26 GB below
``--work``, and as much again in results, one at a time.

    python benchmarks/offload.py --size 1b
    python benchmarks/offload.py --size 7b --modes memory offload --work /path/with/space
    python benchmarks/offload.py --size 13b --modes offload --work /path/with/space
    python benchmarks/offload.py --size 7b --modes compress-offload --work /path/with/space
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from environment import RESULTS, write_result
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import hf_adaptive_sparse as has
from hf_adaptive_sparse.checkpoint.shards import write_index, write_shard
from hf_adaptive_sparse.compressor import (
    DataSource,
    ModelSource,
    compress,
    prune_to_folder,
)
from hf_adaptive_sparse.demo.run import CHECKPOINT
from hf_adaptive_sparse.evaluation.resources import weight_bytes_on_disk
from hf_adaptive_sparse.pruning.report import PruningReport
from hf_adaptive_sparse.report import markdown_table

SEED = 0
SIZES = {
    # hidden size, intermediate size, layers, heads
    "tiny": (256, 688, 4, 4),
    "1b": (2048, 5504, 20, 16),
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
}
GB = 1e9
MODES = ("memory", "offload", "compress", "compress-offload")
TRIALS = 4
"""Of the search in the compress modes; each costs as much as the next."""


def config_of(size: str) -> LlavaConfig:
    hidden, intermediate, layers, heads = SIZES[size]
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
    )
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=32000, dtype="bfloat16"
    )


def write_checkpoint(size: str, folder: Path) -> int:
    """Write random weights, one decoder layer a shard; return their bytes."""
    config = config_of(size)
    with init_empty_weights():
        model = LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    folder.mkdir(parents=True)
    groups: dict[str, list[str]] = {}
    for name in model.state_dict():
        _, found, rest = name.partition("language_model.layers.")
        groups.setdefault(rest.split(".")[0] if found else "outside", []).append(name)
    generator = torch.Generator().manual_seed(SEED)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    shards = {}
    for number, names in enumerate(groups.values(), 1):
        tensors = {}
        for name in names:
            tensor = torch.empty(shapes[name], dtype=torch.bfloat16)
            norm = "norm" in name and name.endswith("weight")
            tensors[name] = (
                tensor.fill_(1.0) if norm else tensor.normal_(0, 0.02, generator=generator)
            )
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        shards[file] = write_shard(folder / file, tensors)
    write_index(folder, shards)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    AutoProcessor.from_pretrained(CHECKPOINT).save_pretrained(folder)
    return sum(sum(tensors.values()) for tensors in shards.values())


class AnonymousMemory(threading.Thread):
    """Samples what the process holds without the pages of files, which the system can take back."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most_bytes = 0

    def run(self) -> None:
        """Sample for as long as the process lives."""
        while True:
            for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
                if line.startswith("RssAnon:"):
                    self.most_bytes = max(self.most_bytes, int(line.split()[1]) * 1024)
            time.sleep(0.05)


def measure(mode: str, checkpoint: Path, output: Path, samples: int, tokens: int) -> dict[str, Any]:
    """Prune in this process, and return what it took."""
    generator = torch.Generator().manual_seed(SEED)
    batches = [
        {"input_ids": torch.randint(10, 31000, (1, tokens), generator=generator)}
        for _ in range(samples)
    ]
    data = DataSource(batches)
    config = has.SparsityConfig(target_sparsity=0.5, calibration=has.CalibrationConfig())
    memory = AnonymousMemory()
    memory.start()
    started = time.perf_counter()
    report: PruningReport
    if mode.startswith("compress"):
        report = compress(
            checkpoint,
            output,
            config=config,
            quality="paper",
            n_trials=TRIALS,
            calibration=data,
            evaluation=data,
            offload=mode == "compress-offload",
            progress=False,
        ).report
    else:
        report = prune_to_folder(
            ModelSource(checkpoint),
            output,
            config,
            calibration=data,
            offload=mode == "offload",
            progress=False,
        ).report
    return {
        "mode": mode,
        "seconds": time.perf_counter() - started,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_anonymous_bytes": memory.most_bytes,
        "sparsity": report.mean_sparsity,
        "weight_bytes": weight_bytes_on_disk(output),
    }


def run_child(arguments: argparse.Namespace, mode: str, checkpoint: Path) -> dict[str, Any]:
    output = arguments.work / f"{checkpoint.name}-{mode}"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, __file__, "--child", mode, "--checkpoint", str(checkpoint)]
    command += ["--output", str(output), "--samples", str(arguments.samples)]
    command += ["--tokens", str(arguments.tokens)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(output)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(result: dict[str, Any]) -> str:
    rows = [
        {
            "shape": row["size"],
            "checkpoint": f"{row['checkpoint_bytes'] / GB:.1f} GB",
            "mode": row["mode"],
            "peak memory": f"{row['peak_rss_bytes'] / GB:.1f} GB",
            "without pages of files": f"{row['peak_anonymous_bytes'] / GB:.1f} GB",
            "seconds": f"{row['seconds']:.0f}",
            "calibration": f"{row['samples']} x {row['tokens']} tokens",
            "search": f"{TRIALS} trials" if row["mode"].startswith("compress") else "",
        }
        for row in result["rows"]
    ]
    return (
        "# Pruning in memory and from disk to disk\n\nLLaVA-1.5-shaped checkpoints of random "
        "bfloat16 weights, `lognorm` at 50 %. Peak memory is the process's largest resident set, "
        "mapped pages of the checkpoint included; the system takes those back where memory is "
        "short, so that what a job needs is the column without them. `memory` and `offload` are "
        "`prune`; the compress modes search first, on the same windows.\n\n" + markdown_table(rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="1b")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["memory", "offload"])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "offload-bench")
    parser.add_argument("--child", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        found = measure(
            arguments.child,
            arguments.checkpoint,
            arguments.output,
            arguments.samples,
            arguments.tokens,
        )
        print(json.dumps(found))
        return
    checkpoint = arguments.work / arguments.size
    shutil.rmtree(checkpoint, ignore_errors=True)
    size_bytes = write_checkpoint(arguments.size, checkpoint)
    path = RESULTS / "offload.json"
    earlier = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    replaced = {(arguments.size, mode) for mode in arguments.modes}
    rows = [row for row in earlier if (row["size"], row["mode"]) not in replaced]
    for mode in arguments.modes:
        found = run_child(arguments, mode, checkpoint)
        settings = {"samples": arguments.samples, "tokens": arguments.tokens}
        rows.append({"size": arguments.size, "checkpoint_bytes": size_bytes, **found, **settings})
        print(json.dumps(rows[-1]), flush=True)
    shutil.rmtree(checkpoint)
    order = list(SIZES)
    rows.sort(key=lambda row: (order.index(row["size"]), MODES.index(row["mode"])))
    result = {"seed": SEED, "rows": rows}
    write_result("offload", result, table(result))


if __name__ == "__main__":
    main()
