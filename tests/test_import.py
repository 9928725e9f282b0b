"""What importing the package does, and what it does not."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import hf_adaptive_sparse as has

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("optuna", "matplotlib", "datasets")


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_import_is_lean_and_registers() -> None:
    """Search, report and kernels load what they need at their first use."""
    script = (
        "import sys, hf_adaptive_sparse, torch\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as quantizers\n"
        "assert 'adaptive_sparse' in quantizers\n"
        "assert not torch.cuda.is_initialized()\n"
        "import hf_adaptive_sparse.search.study, hf_adaptive_sparse.report\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
        "from hf_adaptive_sparse.kernels import library, triton_attention\n"
        "print(library.library.cache_info().currsize)\n"
        "before = 'triton' in sys.modules\n"
        "triton_attention.is_available()\n"
        "assert 'hf_adaptive_sparse.kernels.triton_kernels' not in sys.modules\n"
        "assert before == ('triton' in sys.modules)\n"
    )
    assert run(script) == "[]\n0"


def test_importing_first_or_after_transformers_is_the_same() -> None:
    script = (
        "import transformers\n"
        "from transformers import LlamaForCausalLM, PreTrainedModel\n"
        "import hf_adaptive_sparse, importlib\n"
        "once = PreTrainedModel.__dict__['from_pretrained'].__func__\n"
        "importlib.reload(hf_adaptive_sparse)\n"
        "print(PreTrainedModel.__dict__['from_pretrained'].__func__ is once)\n"
        "print(LlamaForCausalLM.from_pretrained.__func__ is once)\n"
        "from transformers import AutoModelForVision2Seq\n"
    )
    assert run(script) == "True\nTrue"


@pytest.mark.parametrize(
    "first", ["processing_utils", "modeling_utils", "models.llama.modeling_llama"]
)
def test_the_auto_class_stays_when_transformers_executes_again(first: str) -> None:
    script = (
        f"import transformers.{first}\n"
        "import hf_adaptive_sparse as has\n"
        "import transformers.processing_utils\n"
        "from transformers import AutoModelForVision2Seq, LlamaForCausalLM\n"
        "print(AutoModelForVision2Seq is has.AutoModelForVision2Seq)\n"
        "print(hasattr(transformers.models.llama, 'AutoModelForVision2Seq'))\n"
    )
    assert run(script) == "True\nFalse"


@pytest.mark.parametrize("name", sorted(has.__all__))
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(has, name)
    assert callable(value) or name == "__version__"
    assert name in dir(has)


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("CheckpointError", ValueError),
        ("DataError", ValueError),
        ("FrozenWeightError", RuntimeError),
        ("HubError", OSError),
        ("NonFiniteError", ValueError),
        ("OutputError", OSError),
        ("PushError", OSError),
        ("SearchError", ValueError),
        ("StorageError", OSError),
    ],
)
def test_public_errors_share_a_base_and_keep_their_builtin_one(
    name: str, builtin: type[Exception]
) -> None:
    error = getattr(has, name)
    assert issubclass(error, has.AdaptiveSparseError)
    assert issubclass(error, builtin)
    assert f".{error.__name__}\n" in (ROOT / "docs/reference.md").read_text()


def test_search_is_a_function_and_a_package() -> None:
    from hf_adaptive_sparse.search.study import search

    assert callable(has.search)
    assert has.search.study.search is search
    assert inspect.signature(has.search) == inspect.signature(search)
    with pytest.raises(TypeError):
        has.search()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = has.nothing
