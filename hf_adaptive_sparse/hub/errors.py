"""Errors of the Hub, each as one line that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from hf_adaptive_sparse.errors import AdaptiveSparseError

# The base of every error of the HTTP library under huggingface_hub, which is httpx in some of the
# versions we support and httpx2 in others.
_TRANSPORT_ERROR: type[BaseException] = next(
    base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"
)

LOG_IN = "run `hf auth login`, set HF_TOKEN, or pass token= in Python"


_ADVICE = {
    403: (
        "the token may not do that",
        f"Use one with the right to it, which to push is the write role: {LOG_IN}.",
    ),
    409: ("it is being changed by someone else", "Look at the change, then try again."),
    412: ("someone else committed to it meanwhile", "Look at the change, then push again."),
    413: (
        "a file is too large for the Hub",
        "Save the model in smaller shards: save_pretrained(folder, max_shard_size='5GB').",
    ),
    429: ("it gets more requests than the Hub allows", "Wait some minutes, then try again."),
}
"""Status of an answer -> why it was given, and what to do."""

OFFLINE = "offline mode is on. Unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE."


class HubError(AdaptiveSparseError, OSError):
    """The Hub could not be reached, or refused what was asked of it."""


def check_repo_id(repo_id: str) -> None:
    """Refuse what cannot be the id of a model repo.

    Raises:
        ValueError: If ``repo_id`` is not ``name`` or ``owner/name`` in the Hub's characters.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"A repo id must be 'owner/name' in letters, digits, '-', '_' and '.', got {repo_id!r}."
        ) from error


@contextmanager
def explained(action: str, repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn what ``huggingface_hub`` raises inside into a :class:`HubError`.

    Args:
        action: What is being done, as in "push to".
        repo_id: The repo it is done to.
        revision: The revision that was asked for.

    Raises:
        HubError: In place of any error of the connection or of the Hub's answer. Errors that do not
            come from there (a file that cannot be read) pass as they are.
    """
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        reason = _reason(error, repo_id, revision)
        if reason is None:
            raise
        raise HubError(f"Cannot {action} {repo_id!r}: {reason}") from error


def _reason(error: BaseException, repo_id: str, revision: str | None) -> str | None:
    """Return why it failed and what to do, or None if the error is not the Hub's."""
    if isinstance(error, OfflineModeIsEnabled):
        return OFFLINE
    if isinstance(error, HfHubHTTPError):
        return _reason_of_answer(error, repo_id, revision)
    if isinstance(error, _TRANSPORT_ERROR | ConnectionError):
        return (
            f"no connection to the Hub ({_first_line(error)}). Check the network, the proxy and "
            "HF_ENDPOINT, then try again."
        )
    # Uploads wrap their errors in a RuntimeError, downloads theirs in a FileNotFoundError.
    if error.__cause__ is not None and isinstance(error, RuntimeError | EntryNotFoundError):
        return _reason(error.__cause__, repo_id, revision)
    if isinstance(error, ValueError):
        # Metadata or uploads that the Hub does not accept, or an answer that is not the Hub's.
        return " ".join(str(error).split())
    return None


def _reason_of_answer(error: HfHubHTTPError, repo_id: str, revision: str | None) -> str:
    status = error.response.status_code
    said = error.response.headers.get("X-Error-Message") or error.server_message or ""
    if isinstance(error, GatedRepoError):
        return (
            f"it is gated. Ask for access on its page, then use a token of that account ({LOG_IN})."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision!r}. Name a branch, a tag or a full commit sha."
    if status == 401 and "credentials" in f"{said}{error}".lower():
        return f"the Hub refused the token (401). Use a valid one: {LOG_IN}."
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no such repo, or it is private and the token cannot see it ({LOG_IN})."
    if isinstance(error, EntryNotFoundError):
        return "the repo lacks a file that was asked for. Is it a complete transformers repo?"
    if status == 401:
        return f"the Hub wants a token (401): {LOG_IN}."
    if status == 409 and error.response.url.path.endswith("/repos/create"):
        return "it exists already (409). Choose another name, or allow it with exist_ok=True."
    if status >= 500:
        return f"the Hub failed (status {status}). Try again later."
    if status in _ADVICE:
        reason, advice = _ADVICE[status]
        return f"{reason} ({status}{': ' + said.rstrip('.') if said else ''}). {advice}"
    return f"the Hub answered {status}: {said or _first_line(error)}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
