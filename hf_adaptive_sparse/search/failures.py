"""Which errors fail a single trial and let the search go on."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch

from hf_adaptive_sparse.errors import NonFiniteError
from hf_adaptive_sparse.search.errors import TrialFailure


@contextlib.contextmanager
def failures() -> Iterator[None]:
    """Turn what concerns a single profile into `TrialFailure`."""
    try:
        yield
    except NonFiniteError as error:
        raise TrialFailure(str(error), repeatable=True) from error
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = f"Out of memory: {error}"
    else:
        return
    # Outside the handler, so that the traceback no longer keeps the tensors alive.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise TrialFailure(reason, repeatable=False)


def _is_out_of_memory(error: BaseException) -> bool:
    # torch's CPU allocator raises a bare RuntimeError, told by its text alone.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "not enough memory" in str(error) or "out of memory" in str(error)
    )
