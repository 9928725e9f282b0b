"""The model of a job, by name or path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import GENERATION_CONFIG_NAME

from hf_adaptive_sparse.calibration.processors import load_processor
from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.checkpoint.empty_weights import keep_in_float32_
from hf_adaptive_sparse.checkpoint.headers import CheckpointError, read_headers
from hf_adaptive_sparse.checkpoint.weight_files import missing_tensors
from hf_adaptive_sparse.hub.source import (
    CONFIG_NAME,
    FolderSource,
    check_no_revision,
    local_folder,
    read_config,
    read_object,
)
from hf_adaptive_sparse.naming import expanded

PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
)
"""Files of which every folder with a tokenizer or a processor that transformers saved has one."""


@dataclass(frozen=True)
class ModelSource:
    """A model by name or path, and how to load it.

    Attributes:
        name: Hub repo or local folder.
        revision: Branch, tag or commit on the Hub.
        dtype: Dtype to load in; ``"auto"``: the one it is stored in.
        device_map: As in transformers. ``None``: the visible GPUs (``CUDA_VISIBLE_DEVICES``) where
            there are any, else the processor.

    Raises:
        ValueError: If there is no such dtype.
    """

    name: str | os.PathLike[str]
    revision: str | None = None
    dtype: str = "auto"
    device_map: str | None = None

    def __post_init__(self) -> None:
        if os.fspath(self.name).startswith("~"):  # which transformers takes for a repo
            object.__setattr__(self, "name", expanded(self.name))
        if self.dtype != "auto" and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(
                "dtype must be the name of a torch dtype, such as bfloat16, or auto, got "
                f"{self.dtype!r}."
            )

    def load(self, sparsity_config: SparsityConfig | None = None) -> PreTrainedModel:
        """Load the model in evaluation mode: one that sees or hears, else one of text, all of it.

        Args:
            sparsity_config: How a compressed model is loaded (runtime, KV profile).

        Raises:
            ValueError: If there is no such folder or no model in it, the config is of neither kind,
                or the device cannot be used.
            CheckpointError: If the weights are damaged, or some of the model's are not there.
            OSError: If there is no such repo, or the Hub cannot be reached.
        """
        self._check_device_map()
        return self._load(self.load_config(), sparsity_config)

    def _check_device_map(self) -> None:
        if self.device_map is not None:
            _check_device(self.device_map)

    def _load(
        self, config: PreTrainedConfig, sparsity_config: SparsityConfig | None = None
    ) -> PreTrainedModel:
        device_map = self.device_map
        if device_map is None and torch.cuda.is_available():
            device_map = "auto"
        model: PreTrainedModel
        try:
            model, found = _auto_class(config).from_pretrained(
                self.name,
                revision=self.revision,
                dtype=self.dtype,
                device_map=device_map,
                sparsity_config=sparsity_config,
                output_loading_info=True,
            )
        except SafetensorError as error:
            raise self._damaged(error) from error
        if found["missing_keys"]:
            raise missing_tensors(self.name, found["missing_keys"], model)
        return model.eval()

    def load_config(self) -> PreTrainedConfig:
        """Load the model's config.

        Raises:
            ValueError: If there is no such folder, no model in it, or a config is damaged.
            OSError: If there is no such repo, or the Hub cannot be reached.
        """
        folder = self._check_folder()
        with self._named():
            config: PreTrainedConfig = AutoConfig.from_pretrained(self.name, revision=self.revision)
            if folder is None:
                _check_configs(self._snapshot())
        return config

    def load_dense(self) -> PreTrainedModel:
        """Load the model, which must not be compressed yet.

        Raises:
            ValueError: If it carries a quantization config, ours or another's.
        """
        config = self._dense_config()
        self._check_device_map()
        return self._load(config)

    def load_empty(self) -> PreTrainedModel:
        """Return the model in evaluation mode with the shapes of its parameters alone.

        They are on the meta device, in the dtype that `load` would give them; buffers are real.

        Raises:
            ValueError: If the model is compressed or quantised, or its dtype is unknown.
        """
        config = self._dense_config()
        name = config.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        if not isinstance(name, torch.dtype):
            raise ValueError(
                f"The config of {self.name} names no dtype, got {name!r}. Give one, such as "
                "dtype='bfloat16' (--dtype)."
            )
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = _auto_class(config).from_config(config, dtype=name)
        model.tie_weights()  # init_empty_weights parts them
        keep_in_float32_(model, name)
        with suppress(OSError):  # not every model has one
            model.generation_config = GenerationConfig.from_pretrained(
                self.name, revision=self.revision
            )
        return model.eval()

    def _dense_config(self) -> PreTrainedConfig:
        config = self.load_config()
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                f"A dense model is needed, {self.name} is compressed or quantised already. Give "
                "the model it was made from."
            )
        return config

    def load_processor(self) -> Any:
        """Load the processor, or the tokenizer where the model has no processor.

        Raises:
            ValueError: If there is no such folder, no model in it, or neither of them.
            OSError: If there is no such repo, or the Hub cannot be reached.
        """
        folder = self._check_folder()
        try:
            with self._named():
                return load_processor(os.fspath(self.name), revision=self.revision)
        except (OSError, ValueError) as error:
            if folder is None and isinstance(error, OSError):  # of the Hub
                raise
            held = folder or self._snapshot()
            if any((held / file).is_file() for file in PROCESSOR_FILES):
                raise
            raise ValueError(
                f"{self.name} has no tokenizer or processor. Save the model's own there: "
                "processor.save_pretrained(folder)."
            ) from error

    def _check_folder(self) -> Path | None:
        """Return the folder of a local model, after a look at its configs."""
        folder = local_folder(self.name)
        if folder is not None:
            check_no_revision(self.name, self.revision)
            _check_configs(folder)
        return folder

    def _snapshot(self) -> Path:
        """Return the folder in the Hub's cache that holds the configs of a repo."""
        name = os.fspath(self.name)
        with suppress(EntryNotFoundError):  # not every model has one
            hf_hub_download(name, GENERATION_CONFIG_NAME, revision=self.revision)
        return Path(hf_hub_download(name, CONFIG_NAME, revision=self.revision)).parent

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Name the repo in an error of the body: transformers does not where the Hub is away."""
        try:
            yield
        except OSError as error:
            if str(self.name) in str(error) or local_folder(self.name) is not None:
                raise
            raise OSError(
                f"{self.name} is no local folder, and cannot be read from the Hub: {error}"
            ) from error

    def _damaged(self, error: SafetensorError) -> CheckpointError:
        """Return what is wrong with the weights, by file where the headers tell."""
        folder = local_folder(self.name)
        try:
            if folder is not None:
                read_headers(folder)
        except CheckpointError as found:
            return found
        return CheckpointError(
            f"The weights of {self.name} cannot be read ({error}). A file is truncated or damaged; "
            "download or save it again."
        )


def _check_configs(folder: Path) -> None:
    """Refuse damaged configs.

    transformers loads a model with a damaged generation config without a word, and without it.
    """
    source = FolderSource(folder)
    read_config(source)
    if GENERATION_CONFIG_NAME in source.sizes:
        read_object(source, GENERATION_CONFIG_NAME)


def _check_device(name: str) -> None:
    """Refuse a device that torch cannot use here."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):  # a way to place the model, such as "auto"
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for a device
        raise ValueError(
            f"device_map must name a device that torch can use here, got {name!r}. "
            "`hf-adaptive-sparse env` lists them."
        ) from error


def _auto_class(config: PreTrainedConfig) -> Any:
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    # The causal class of an encoder-decoder (Whisper, BART) is its decoder alone.
    if config.is_encoder_decoder and type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return AutoModelForSeq2SeqLM
    if config.is_encoder_decoder and type(config) in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING:
        return AutoModelForSpeechSeq2Seq
    hears = type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING
    if hears and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForMultimodalLM
    return AutoModelForCausalLM


def parameter_bytes(model: PreTrainedModel) -> int:
    """Return the bytes a dense checkpoint of ``model`` takes; tied weights count once."""
    return sum(parameter.nbytes for parameter in model.parameters())
