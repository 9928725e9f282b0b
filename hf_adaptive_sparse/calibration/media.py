"""Images, videos or sounds beside a text, as arguments of a model's processor.

Every processor of transformers takes them by the same three arguments (``images``, ``videos``,
``audio``), and a placeholder stands for each in the text; what differs between models is behind
that.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PretrainedConfig
from transformers.utils import is_torchvision_available

from hf_adaptive_sparse.architecture import accepts_audio, accepts_images
from hf_adaptive_sparse.calibration.pictures import load_frames, load_images
from hf_adaptive_sparse.calibration.sounds import load_sound
from hf_adaptive_sparse.calibration.tables import AUDIO, IMAGE, VIDEO, DataError, Row

Medium = Literal["image", "video", "audio"]

MEDIA: tuple[Medium, ...] = (IMAGE, VIDEO, AUDIO)
"""In the order in which data that have several are used."""

COLUMN = "column"
"""Key of a row: the column of its image, video or sound, for messages."""

PLACE = "place"
"""Key of a row: where it was read, for messages (``"row 3 of x.jsonl"``)."""

PLURAL: Mapping[Medium, str] = {IMAGE: "images", VIDEO: "videos", AUDIO: "sounds"}
_PARTS: Mapping[Medium, tuple[str, ...]] = {
    IMAGE: ("image_processor",),
    VIDEO: ("video_processor",),
    AUDIO: ("feature_extractor", "audio_processor"),
}
"""Attributes of a processor, one of which reads the medium."""

_PLACED_BY_THE_PROCESSOR = ("Florence2Processor",)
"""Processors that put the placeholder of an image before every text, whatever it holds."""


@dataclass(frozen=True)
class Media:
    """Images, videos or sounds, one for each text, or several images.

    Attributes:
        medium: What they are.
        values: As `load_images`, `load_frames` or `load_sound` takes them.
        places: Where each was read, for messages; empty: not known.
    """

    medium: Medium
    values: Sequence[Any]
    places: Sequence[str] = ()

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Media | None:
        """Return the media of rows, ``None`` if they have none.

        Raises:
            DataError: If some rows have another medium than the first, or none.
        """
        medium = medium_of(rows[0])
        if any(medium_of(row) != medium for row in rows):
            raise DataError("The rows of one batch must all have images, a video or a sound.")
        if medium is None:
            return None
        places = [f"Column {row[COLUMN]!r} of {row[PLACE]}" for row in rows if PLACE in row]
        return cls(
            medium, [row[medium] for row in rows], places if len(places) == len(rows) else ()
        )

    def arguments(self, processor: Any) -> dict[str, Any]:
        """Open them, and return the processor's arguments for them.

        Raises:
            DataError: If one cannot be opened; its row and column are named.
        """
        if self.medium == IMAGE:
            return {"images": self._opened(load_images)}
        if self.medium == VIDEO:
            # Frames are chosen already; a processor would ask for the times of what it samples.
            return {
                "videos": self._opened(load_frames),
                "videos_kwargs": {"do_sample_frames": False},
            }
        rate = sampling_rate(processor)
        return {
            "audio": self._opened(lambda value: load_sound(value, rate)),
            "audio_kwargs": {"sampling_rate": rate},
        }

    def _opened(self, load: Callable[[Any], Any]) -> list[Any]:
        found = []
        for index, value in enumerate(self.values):
            try:
                found.append(load(value))
            except DataError as error:
                if not self.places:
                    raise
                raise DataError(f"{self.places[index]} cannot be used: {error}") from error
        return found


def medium_of(row: Row) -> Medium | None:
    """Return what a row shows beside its text; ``None`` if nothing."""
    return next((medium for medium in MEDIA if row.get(medium) is not None), None)


def shown(row: Row) -> int:
    """Return how many images, videos or sounds a row shows: there may be several images."""
    images = row.get(IMAGE)
    return len(images) if isinstance(images, list) else 1


def accepted_media(config: PretrainedConfig) -> Collection[Medium]:
    """Return the media that a model may take, as far as its config tells.

    Whether a model that takes images takes videos, too, only its processor knows; see
    `require_processor`.
    """
    accepted: list[Medium] = []
    if accepts_images(config):
        accepted += [IMAGE, VIDEO]
    if accepts_audio(config):
        accepted += [AUDIO]
    return accepted


def require_processor(processor: Any, medium: Medium, data: str) -> None:
    """Check that a processor takes a medium.

    Args:
        processor: The model's processor.
        medium: What the data show beside text.
        data: Their name, for messages.

    Raises:
        ValueError: If it does not.
    """
    name, plural = type(processor).__name__, PLURAL[medium]
    if all(getattr(processor, part, None) is None for part in _PARTS[medium]):
        part = _PARTS[medium][0].replace("_", " ")
        way_out = "Load it with AutoProcessor, or use data with a 'text' column."
        if medium != AUDIO and not is_torchvision_available():
            way_out += " Processors that take videos, too, need torchvision: pip install it."
        raise ValueError(
            f"{data} holds {plural}, so the model's processor must have {_article(part)}; {name} "
            f"has none. {way_out}"
        )
    if not takes(processor, medium):
        raise ValueError(
            f"{data} holds sounds, and {name} takes them only in conversations of its own. Make "
            "the batches with its apply_chat_template(), with labels of -100 on all but the "
            "answers, and give them instead of the data."
        )


def takes(processor: Any, medium: Medium) -> bool:
    """Return whether a processor takes a medium beside texts in its call."""
    if all(getattr(processor, part, None) is None for part in _PARTS[medium]):
        return False
    arguments = inspect.signature(type(processor).__call__).parameters
    return medium != AUDIO or "audio" in arguments


def takes_suffix(processor: Any) -> bool:
    """Return whether a processor takes what a prompt is answered with apart from it (PaliGemma).

    Its model reads all of a prompt at once: an answer inside would be seen by the tokens before it.
    Such a processor puts bos in front of the prompt and a newline behind it.
    """
    return "suffix" in inspect.signature(type(processor).__call__).parameters


def placeholder(processor: Any, medium: Medium) -> str:
    """Return the token that stands for an image, a video or a sound in a text."""
    name = f"{medium}_token"
    for owner in (processor, getattr(processor, "tokenizer", processor)):
        token = getattr(owner, name, None)
        if isinstance(token, str):
            return token
    return f"<{medium}>"


def needed_placeholder(processor: Any, medium: Medium | None) -> str:
    """Return what a plain prompt must hold for a medium; nothing, if the processor adds it."""
    placed = type(processor).__name__ in _PLACED_BY_THE_PROCESSOR
    return "" if medium is None or placed else placeholder(processor, medium)


def sampling_rate(processor: Any) -> int:
    """Return the samples per second that a processor wants.

    Raises:
        ValueError: If it does not say.
    """
    for part in _PARTS[AUDIO]:
        rate = getattr(getattr(processor, part, None), "sampling_rate", None)
        if isinstance(rate, int):
            return rate
    raise ValueError(
        f"The processor must name the sampling rate of its sounds; {type(processor).__name__} "
        "does not. Set sampling_rate on its feature extractor."
    )


def processed(processor: Any, text: Sequence[str], arguments: Mapping[str, Any]) -> Any:
    """Call a processor; say what to do where it cannot be.

    Raises:
        ValueError: If it needs a package that is not installed, or does not take the texts and
            what comes with them, such as videos of different lengths in one batch.
    """
    name = type(processor).__name__
    try:
        return processor(text=list(text), return_tensors="pt", **arguments)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} needs a package that is not installed: {reason}") from error
    except ValueError as error:
        if len(text) == 1:
            raise
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{name} does not take {len(text)} questions as one batch: {reason}. Use a batch size "
            "of 1."
        ) from error


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
