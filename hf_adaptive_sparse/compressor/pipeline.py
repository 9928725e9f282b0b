"""The main job: make a complete, measured, compressed model of a dense one."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace

from hf_adaptive_sparse.calibration.data import Source
from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.compressor.checks import (
    check_goal,
    check_offloadable,
    check_pushed,
    on_cpu,
)
from hf_adaptive_sparse.compressor.companions import check_workers
from hf_adaptive_sparse.compressor.compression import Compression, CompressionResult
from hf_adaptive_sparse.compressor.data_source import DataSource
from hf_adaptive_sparse.compressor.model_source import ModelSource
from hf_adaptive_sparse.compressor.presets import DEFAULT_QUALITY, Preset, get_preset
from hf_adaptive_sparse.compressor.pruned_folder import output_folder
from hf_adaptive_sparse.compressor.search_plan import SearchPlan
from hf_adaptive_sparse.compressor.targets import checked_target
from hf_adaptive_sparse.errors import AdaptiveSparseError
from hf_adaptive_sparse.hub import push_folder
from hf_adaptive_sparse.search.data import EVALUATION_SAMPLES
from hf_adaptive_sparse.search.objectives import ObjectiveSpec
from hf_adaptive_sparse.search.samplers import DEFAULT_SAMPLER
from hf_adaptive_sparse.search.space import FREE, SearchSpace
from hf_adaptive_sparse.search.storage import JOURNAL


class PushError(AdaptiveSparseError, OSError):
    """The model was compressed and is complete in its folder, but could not be pushed.

    Attributes:
        result: What `compress` did before.
    """

    def __init__(
        self, result: CompressionResult, repo_id: str, *, private: bool, reason: Exception
    ) -> None:
        command = ["hf-adaptive-sparse", "push", str(result.output), repo_id]
        command += ["--private"] if private else []
        super().__init__(
            f"{reason} The model is complete in {result.output}; push it later by "
            f"`{shlex.join(command)}`."
        )
        self.result = result


def compress(
    model: ModelSource | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    config: SparsityConfig | None = None,
    space: SearchSpace | None = None,
    quality: str = DEFAULT_QUALITY,
    n_trials: int | None = None,
    calibration: DataSource | Source = None,
    evaluation: DataSource | Source = None,
    questions: DataSource | Source = None,
    objective: ObjectiveSpec = "perplexity",
    timeout_seconds: float | None = None,
    max_loss: float | None = None,
    workers: int = 1,
    storage: str | None = None,
    study_name: str | None = None,
    seed: int = 0,
    sampler: str = DEFAULT_SAMPLER,
    overwrite: bool = False,
    offload: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    progress: bool = True,
) -> CompressionResult:
    """Search, prune and save: the whole method of arXiv 2507.20613 on one model.

    The model is loaded once and never copied. The search masks it without changing it; the best
    profile is then pruned in place, layer by layer. ``output`` appears only when everything in it
    is written: weights, processor, generation config, ``profile.json``, the search's history and
    plots, and a model card. A killed run resumes its search when it is called again.

    Args:
        model: The dense model, or its name or path.
        output: Folder to write; it must be missing or empty, unless ``overwrite``.
        config: Metric, pattern, format and calibration mode. Its target sparsity must be the
            space's; its KV profile is the space's to find, and kept where that leaves the cache
            alone. A metric that updates weights (sparsegpt, alps) does the final prune, while the
            search ranks with ``lognorm``.
        space: What to search. ``None``: the quality's space at the config's target sparsity.
        quality: Name of a preset (`compressor.presets`), which says what ``config``, ``space`` and
            ``n_trials`` leave open.
        n_trials: Trials of the search, the first of which is the uniform profile. ``None``: the
            quality's.
        calibration: Data to calibrate on: a dataset's name, a path, a `datasets.Dataset`, batches,
            or a `DataSource`, which says how much of them. ``None``: WikiText-2, training split.
        evaluation: Data to evaluate on, likewise: the search sees ``num_samples`` of them (64), the
            final figures as many others; of batches, half each. ``None``: WikiText-2, validation
            split.
        questions: Visual questions for the final figures. ``None``: those that ``evaluation``
            holds, if it does, without the ones that the search sees; of conversations none.
        objective: What the search minimises, see ``has.search``.
        timeout_seconds: Time after which the search starts no further trial.
        max_loss: Make the smallest checkpoint (or, where the space chooses KV bits alone, the
            fewest KV bits) whose perplexity on held-out data rises by this at most, 0.005 being
            0.5 %. Each budget that is tried is pruned as the final one is, so that the bound is
            that of what is saved; meanwhile a copy of the decoder's weights is in CPU memory.
        workers: Processes to search with on this machine, this one included. A script that asks for
            several does so below ``if __name__ == "__main__":``.
        storage: Optuna storage URL, or path of a journal. ``None``: a journal beside ``output``.
        study_name: Name of the study there. ``None``: ``"hf-adaptive-sparse"``.
        seed: Seed of the search.
        sampler: As for ``has.search``.
        overwrite: Replace what is in ``output`` when the job is done.
        offload: For a model larger than the memory, on the CPU. The search reads the weights from
            the checkpoint's files, which stay mapped, and holds only the order in which they may
            go (4 bytes for each weight within the range of the ratios, a bit for each of all); the
            final prune is that of `prune_to_folder`, and resumes at the layer it had reached.
        push_to_hub: Repo id to push to.
        private: Make the pushed repo private.
        progress: Show progress bars on stderr.

    Raises:
        ValueError: If an argument or the data are invalid; before any weight is touched.
        TypeError: If a batch is not a dict of tensors.
        OSError: If the model cannot be found, or the output cannot be written.
        HubError: If ``push_to_hub`` is given and there is no token; before any work is done.
        PushError: If the model is complete but the Hub did not take it.
    """
    check_workers(workers)
    reads = (model, calibration, evaluation, questions)
    target = checked_target(output, reads, overwrite=overwrite)
    check_pushed(push_to_hub, private)
    origin = model if isinstance(model, ModelSource) else ModelSource(model)
    preset = get_preset(quality)
    calibration = DataSource.of(calibration, "calibration", DataSource.num_samples)
    evaluation = DataSource.of(evaluation, "evaluation", EVALUATION_SAMPLES)
    if questions is not None:
        questions = DataSource.of(questions, "questions", EVALUATION_SAMPLES, batches=False)
    config = preset.config(config)
    space = space or _default_space(preset, config, max_loss)
    check_goal(config, space, max_loss, workers)
    if offload:
        check_offloadable(max_loss)
        origin = on_cpu(origin)
    plan = SearchPlan(
        space=space,
        storage=storage,
        study_name=study_name,
        metric=config.metric,
        n_trials=preset.n_trials if n_trials is None else n_trials,
        calibration=calibration,
        evaluation=evaluation,
        objective=objective,
        timeout_seconds=timeout_seconds,
        seed=seed,
        sampler=sampler,
        excluded=tuple(config.modules_to_not_convert or ()),
        max_loss=max_loss,
        final=config,
    )
    job = Compression(
        model=origin,
        output=target,
        plan=plan,
        config=config,
        evaluation=evaluation,
        questions=questions,
        workers=workers,
        offload=offload,
        repo_id=push_to_hub,
        progress=progress,
    )
    with output_folder(target, offload=offload, overwrite=overwrite, keep=(JOURNAL,)) as folder:
        done = job.run(folder)
    return done if push_to_hub is None else _push(done, push_to_hub, private)


def _default_space(preset: Preset, config: SparsityConfig, max_loss: float | None) -> SearchSpace:
    space = preset.space(config)
    if max_loss is None or not space.prunes:
        return space
    return replace(space, target_sparsity=FREE)


def _push(done: CompressionResult, repo_id: str, private: bool) -> CompressionResult:
    try:
        commit_url = push_folder(done.output, repo_id, private=private)
    except (OSError, ValueError) as error:
        raise PushError(done, repo_id, private=private, reason=error) from error
    return replace(done, commit_url=commit_url)
