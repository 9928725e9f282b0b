"""The license that a model's own card states."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.repocard import metadata_load

from hf_adaptive_sparse.hub.errors import explained
from hf_adaptive_sparse.hub.source import local_folder
from hf_adaptive_sparse.naming import CARD_NAME

logger = logging.getLogger(__name__)


def license_of(
    repo_or_folder: str | os.PathLike[str], revision: str | None = None
) -> dict[str, str]:
    """Return the license that a model's card states, as metadata for the card of a derived model.

    Args:
        repo_or_folder: Hub repo or local folder.
        revision: Branch, tag or commit on the Hub.

    Returns:
        ``license`` and, for a license without a Hub identifier, ``license_name`` and
        ``license_link``; a link to a file of the repo is made absolute, one to a file of a local
        folder left out. Empty if there is no card, it states none, or it cannot be read.
    """
    name = os.fspath(repo_or_folder)
    try:
        folder = local_folder(name)
        metadata = metadata_load(_card(name, revision, folder)) or {}
    except Exception as error:  # the model is made by now, whatever is wrong with another's card
        logger.info("The license of %s is not known: %s", name, error)
        return {}
    fields = {
        key: metadata[key]
        for key in ("license", "license_name", "license_link")
        if isinstance(metadata.get(key), str)
    }
    if "://" not in fields.get("license_link", "://"):
        file = fields.pop("license_link")
        if folder is None:
            page = f"https://huggingface.co/{name}/blob/{revision or 'main'}"
            fields["license_link"] = f"{page}/{file}"
    return fields


def _card(name: str, revision: str | None, folder: Path | None) -> Path:
    if folder is not None:
        return folder / CARD_NAME
    with explained("read the card of", name, revision):
        return Path(hf_hub_download(name, CARD_NAME, revision=revision))
