"""A model's processor, or its tokenizer where it has no processor."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError

logger = logging.getLogger(__name__)

PROCESSOR_CONFIGS = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
"""Files that a model with a processor has one of, and a model with a tokenizer alone has none."""


def load_processor(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Any:
    """Load a model's processor, or its tokenizer where it has no processor.

    A processor that needs a package that is not installed, or code from the repo, which is never
    run, is replaced by the tokenizer with a warning. One that has no chat template gets that of its
    tokenizer. Arguments are those of ``from_pretrained``.

    Raises:
        OSError: If the repo or folder has neither.
        ValueError: If there is no name, or it has a processor or a tokenizer that cannot be loaded.
    """
    from transformers import AutoProcessor

    if not os.fspath(name_or_path):
        raise ValueError(
            "Data that are no batches yet need the model's processor or tokenizer, and a model "
            "that was made in memory names no repository of one: pass processor=, or batches."
        )
    hub: dict[str, Any] = {
        "revision": revision or "main",
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    try:
        processor = AutoProcessor.from_pretrained(name_or_path, **hub, trust_remote_code=False)
    except Exception as error:  # of any type where a file is damaged
        tokenizer = _load_tokenizer(name_or_path, hub)
        if isinstance(error, ImportError):
            _warn_of_text_alone(name_or_path, "a package that is not installed", error)
        elif file := _processor_file(name_or_path, hub):
            if "trust_remote_code" not in str(error):
                raise ValueError(
                    f"The processor of {name_or_path}, which has a {file}, cannot be loaded "
                    f"({first_line(error).rstrip('.')}). Save or download it again."
                ) from error
            _warn_of_text_alone(name_or_path, "code of its own, which is never run", error)
        return tokenizer
    # Phi-4-multimodal's constructor takes no template, so that of the repo is lost.
    if getattr(processor, "chat_template", None) is None:
        processor.chat_template = getattr(
            getattr(processor, "tokenizer", None), "chat_template", None
        )
    return processor


def _load_tokenizer(name_or_path: str | os.PathLike[str], hub: Mapping[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name_or_path, **hub, trust_remote_code=False)
    except (ImportError, OSError, ValueError, StrictDataclassError):
        raise
    except Exception as error:  # tokenizers raises no other where a file is damaged
        raise ValueError(
            f"The tokenizer of {name_or_path} cannot be loaded ({first_line(error).rstrip('.')}). "
            "Save or download it again."
        ) from error


def _processor_file(name_or_path: str | os.PathLike[str], hub: Mapping[str, Any]) -> str | None:
    """Return the name of a file that describes the model's processor; ``None``: it has none."""
    from transformers.utils import has_file

    return next((file for file in PROCESSOR_CONFIGS if has_file(name_or_path, file, **hub)), None)


def _warn_of_text_alone(
    name_or_path: str | os.PathLike[str], need: str, error: BaseException
) -> None:
    logger.warning(
        "The processor of %s needs %s; only its tokenizer is used, which takes text alone. %s",
        name_or_path,
        need,
        " ".join(str(error).split()),
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that says something; else its type."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
