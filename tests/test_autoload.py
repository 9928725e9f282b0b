"""The plugin registers itself where it is installed, and never in the way of anything else."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_adaptive_sparse_autoload as autoload

FIXTURE = Path(__file__).parent / "checkpoint/fixtures/v1"
INSTALL = "import hf_adaptive_sparse_autoload as autoload; autoload.install()\n"
LOAD = (
    "from transformers import AutoModelForCausalLM\n"
    f"model = AutoModelForCausalLM.from_pretrained({str(FIXTURE)!r})\n"
    "weight = model.get_submodule('model.layers.0.mlp.up_proj').weight\n"
    "print(type(model.hf_quantizer).__name__, round(float((weight == 0).float().mean()), 1))\n"
)


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def output(script: str, **environment: str) -> str:
    done = run(script, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_hook_itself_imports_nothing_and_leaves_no_trace() -> None:
    script = (
        "import sys\n"
        + INSTALL
        + "autoload.install()\n"
        + "print(len([f for f in sys.meta_path if type(f).__module__ == autoload.__name__]))\n"
        + "print([m for m in ('torch', 'transformers') if m in sys.modules])\n"
        + "import transformers.modeling_utils as awaited, inspect\n"
        + "print('hf_adaptive_sparse' in sys.modules)\n"
        + "print(len([f for f in sys.meta_path if type(f).__module__ == autoload.__name__]))\n"
        + "print(type(awaited.__loader__) is type(awaited.__spec__.loader) is type(os.__loader__))"
    )
    expected = "1\n[]\nTrue\n0\nTrue"
    # Any module that is read from a source file has the loader that the awaited one must have.
    assert output("import argparse as os\n" + script) == expected


@pytest.mark.parametrize("awaited", autoload.AWAITED)
def test_a_checkpoint_loads_whichever_part_of_transformers_comes_first(awaited: str) -> None:
    script = (
        INSTALL
        + f"import {awaited}\n"
        + "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as quantizers\n"
        + "print('adaptive_sparse' in quantizers)\n"
    )
    assert output(script + LOAD) == "True\nAdaptiveSparseQuantizer 0.4"


@pytest.mark.parametrize("awaited", autoload.AWAITED)
def test_a_checkpoint_loads_where_transformers_is_what_imports_torch(awaited: str) -> None:
    script = (
        "import sys, hf_adaptive_sparse_autoload as autoload\n"
        "class Torch:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == 'torch' and {awaited!r} in sys.modules:\n"
        "            autoload.install()\n"
        "sys.meta_path.insert(0, Torch())\n"
        f"import {awaited}\n"
    )
    found = output(script + LOAD, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert found == "AdaptiveSparseQuantizer 0.4"


def test_it_follows_transformers_that_is_there_already() -> None:
    script = (
        "import sys, transformers.modeling_utils\n"
        "for name in [m for m in sys.modules if m.split('.')[0] == 'hf_adaptive_sparse']:\n"
        "    del sys.modules[name]\n"
    )
    check = "print('hf_adaptive_sparse' in sys.modules)\n"
    found = output(script + check + INSTALL + check, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert found == "False\nTrue"


def test_a_broken_plugin_stops_nobody() -> None:
    script = "import sys\nsys.modules['hf_adaptive_sparse.version'] = None\n" + INSTALL
    done = run(script + "from transformers import PreTrainedModel; print('fine')")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fine"
    assert "cannot be imported, so compressed checkpoints cannot be read" in done.stderr


SLOW_FINDER = """
import sys, time
from importlib.machinery import PathFinder

class Slow:
    def find_spec(name, path=None, target=None):
        while name == "other" and any(type(f) is autoload._Finder for f in sys.meta_path):
            time.sleep(0.01)

sys.meta_path.insert(sys.meta_path.index(PathFinder), Slow)
import transformers.quantizers
transformers.quantizers.thread.join()
print("hf_adaptive_sparse" in sys.modules)
"""
AWAITED_SOURCE = """
import threading, time

def find():
    import other
    print("found")

thread = threading.Thread(target=find)
thread.start()
time.sleep(0.1)
"""


def test_another_thread_misses_no_finder_while_the_hook_leaves(tmp_path: Path) -> None:
    for name in ("transformers/__init__", "transformers/quantizers", "hf_adaptive_sparse", "other"):
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(AWAITED_SOURCE if name == "transformers/quantizers" else "")
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    assert output(path + INSTALL + SLOW_FINDER) == "found\nTrue"


def test_importing_the_plugin_first_is_the_same() -> None:
    script = INSTALL + "import hf_adaptive_sparse\n" + LOAD
    assert output(script) == "AdaptiveSparseQuantizer 0.4"


def test_torch_calls_the_hook_of_an_installed_package() -> None:
    points = importlib.metadata.entry_points(group="torch.backends")
    if "hf_adaptive_sparse" not in points.names:
        pytest.skip("the package is not installed here with its entry point")
    assert output(LOAD) == "AdaptiveSparseQuantizer 0.4"
