"""Push a compressed folder in one commit: the repo takes the new version or stays as it was.

Weight files that the repo had and the folder has not (shards of an earlier, larger version) leave
in the same commit, since transformers would otherwise go on loading them.
"""

from __future__ import annotations

import logging
import os
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
)

from hf_adaptive_sparse.checkpoint.headers import INDEX_NAME, WEIGHTS_NAME, shard_names
from hf_adaptive_sparse.files import UNFINISHED
from hf_adaptive_sparse.hub.errors import LOG_IN, OFFLINE, HubError, check_repo_id, explained
from hf_adaptive_sparse.hub.reading import inspect
from hf_adaptive_sparse.naming import CARD_NAME, UNNAMED_REPO, expanded

logger = logging.getLogger(__name__)

WEIGHT_PATTERNS = (
    "model*.safetensors",
    "model*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "tf_model*.h5",
    "flax_model*.msgpack",
)
"""Files at the root of a repo that transformers loads weights from."""

_SKIPPED_ENDINGS = (UNFINISHED, ".lock", ".tmp", "-journal", "-wal", "-shm", ".journal")
"""Unfinished files, and storages of a search: those name the machine they were made on."""


class CommitUrl(str):
    """The address of a commit.

    Attributes:
        is_new: Whether the push made it; False: the branch held the same files before.
    """

    is_new: bool

    def __new__(cls, url: str, is_new: bool = True) -> CommitUrl:
        """Make one."""
        made = super().__new__(cls, url)
        made.is_new = is_new
        return made


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    exist_ok: bool = True,
) -> CommitUrl:
    """Push a compressed model's folder as one commit.

    Hidden files, files still being written (``*.partial``) and what a sharded version left beside
    ``model.safetensors`` stay behind. Nothing is sent before the folder has been found complete. A
    push that fails leaves the branch as it was; a repo or branch that the push made first stays,
    without the model.

    Args:
        folder: What ``save_pretrained`` or ``compress`` wrote.
        repo_id: ``owner/name``; made if it does not exist.
        private: Make a new repo private. An existing public repo is refused.
        revision: Branch to commit to, made from ``main`` if it does not exist; None: ``main``.
        commit_message: Title of the commit.
        token: Access token with the write role; None: the one of HF_TOKEN or ``hf auth login``.
        endpoint: Address of the Hub; None: HF_ENDPOINT, or the public one.
        exist_ok: Whether the repo may exist already.

    Returns:
        The address of the commit; of the branch's last one where nothing had changed.

    Raises:
        ValueError: If the repo id is invalid, or the folder is not a complete compressed model or
            holds two.
        HubError: If the Hub cannot be reached or refuses; the message says what to do.
    """
    token = push_token(repo_id, token)
    folder = expanded(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r} to push.")
    inspect(folder)
    leftovers = shard_leftovers(folder)
    files = {name: path for name, path in folder_files(folder).items() if name not in leftovers}
    api = HfApi(endpoint=endpoint, token=token)
    with explained("push to", repo_id, revision):
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=exist_ok).repo_id
        if revision is not None and revision != "main":
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=revision or "main")
        if private and not info.private:
            raise HubError(
                f"Cannot push to {repo_id!r}: it exists and is public, but private was asked for. "
                "Make it private in its settings, or choose another name."
            )
        present = [sibling.rfilename for sibling in info.siblings or []]
        stale = stale_weights(present, files)
        if stale:
            logger.info("Removing weight files of an earlier version: %s", ", ".join(stale))
        commit = api.create_commit(
            repo_id,
            operations=[
                *(
                    CommitOperationAdd(name, _content(name, path, repo_id))
                    for name, path in files.items()
                ),
                *(CommitOperationDelete(path, is_folder=False) for path in stale),
            ],
            commit_message=commit_message or "Upload a model compressed with hf_adaptive_sparse",
            revision=revision,
            parent_commit=info.sha,
        )
    return CommitUrl(commit.commit_url, is_new=commit.oid != info.sha)


def _content(name: str, path: Path, repo_id: str) -> Path | bytes:
    """Return what is pushed of a file: a model card comes to name its repo."""
    if name != CARD_NAME:
        return path
    return path.read_bytes().replace(UNNAMED_REPO.encode(), repo_id.encode())


def push_token(repo_id: str, token: str | None = None) -> str:
    """Return the token to push with, after the checks that need no connection.

    Args:
        repo_id: ``owner/name``.
        token: As for `push_folder`.

    Raises:
        ValueError: If the repo id is invalid.
        HubError: If there is no token, or offline mode is on.
    """
    check_repo_id(repo_id)
    token = token or get_token()
    if not token:
        raise HubError(
            f"Cannot push to {repo_id!r}: that needs a token with write access; {LOG_IN}."
        )
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"Cannot push to {repo_id!r}: {OFFLINE}")
    return token


def folder_files(folder: Path) -> dict[str, Path]:
    """Return the files to push: path in the repo -> local path, in order of name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") and part != ".gitattributes" for part in parts)
        temporary = path.name.endswith(_SKIPPED_ENDINGS) or "__pycache__" in parts
        if path.is_file() and not hidden and not temporary:
            found["/".join(parts)] = path
    return found


def shard_leftovers(folder: Path) -> set[str]:
    """Return the files of a sharded version that ``model.safetensors`` replaced.

    ``save_pretrained`` removes neither the index of shards nor, before it writes shards, the single
    file, which transformers goes on loading.

    Raises:
        ValueError: If the sharded version is complete, so that either may be the newer.
    """
    index = folder / INDEX_NAME
    if not (folder / WEIGHTS_NAME).is_file() or not index.is_file():
        return set()
    shards = shard_names(index.read_bytes(), str(index))
    if all((folder / shard).is_file() for shard in shards):
        raise ValueError(
            f"A folder must hold the weights once, {folder} holds both {WEIGHTS_NAME}, which "
            f"transformers loads, and the shards of {INDEX_NAME}. Remove the older of the two."
        )
    return {INDEX_NAME, *shards}


def stale_weights(present: list[str], pushed: dict[str, Path]) -> list[str]:
    """Return the weight files in ``present`` that the new version does not bring."""
    return [
        path
        for path in present
        if path not in pushed
        and "/" not in path  # which a * matches, too
        and any(fnmatchcase(path, pattern) for pattern in WEIGHT_PATTERNS)
    ]
