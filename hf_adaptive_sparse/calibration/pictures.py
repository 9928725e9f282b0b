"""Open images and frames of videos, in any form that a row may hold."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from transformers.video_utils import load_video

from hf_adaptive_sparse.calibration.tables import DataError

MAX_FRAMES = 8
"""Frames taken of an encoded video, evenly spaced. A list of frames is taken as it is."""

DECODERS = {"torchcodec": "torchcodec", "pyav": "av", "opencv": "cv2", "decord": "decord"}
"""What transformers decodes videos with -> the module that it needs, the first found is used."""


def load_image(image: Any) -> Image.Image:
    """Open an image of a record.

    Args:
        image: A PIL image, encoded bytes, a path, or ``{"bytes": ..., "path": ...}``.

    Returns:
        The image in RGB, upright.

    Raises:
        DataError: If it cannot be opened, or has values of an unknown range.
    """
    try:
        image = encoded(image)
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        elif isinstance(image, str | os.PathLike):
            image = Image.open(image)
        if isinstance(image, Image.Image):
            return _in_rgb(image)
    except Exception as error:  # Pillow raises what its parsing happens to meet
        raise DataError(f"An image cannot be opened: {error}") from error
    raise DataError(
        "An image must be a PIL image, encoded bytes, a path, or {'bytes', 'path'}; got "
        f"{type(image).__name__}."
    )


def load_images(value: Any) -> list[Image.Image]:
    """Open the image of a record, or all of a list of them.

    Raises:
        DataError: As `load_image`.
    """
    return [load_image(image) for image in (value if isinstance(value, list) else [value])]


def _in_rgb(image: Image.Image) -> Image.Image:
    """Return an image upright and in RGB, 16 bits of grey scaled to 8: Pillow would clip them.

    Raises:
        ValueError: If its values are of 32 bits, whose range nothing tells.
    """
    if image.mode in ("I", "F"):
        raise ValueError(
            f"it must have 8 or 16 bits per channel; mode {image.mode!r} has 32, of an unknown "
            "range. Scale its values to 8 bits."
        )
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    return upright.convert("RGB")


def load_frames(video: Any) -> list[Image.Image]:
    """Open the frames of a video of a record.

    Args:
        video: A list of frames (each as `load_image` takes it), an array ``(frames, height, width,
            3)`` of uint8, or an encoded video: bytes, a path, or ``{"bytes": ..., "path": ...}``.
            Animated GIF, WebP and PNG are read by Pillow, other formats by the first of `DECODERS`
            that is installed.

    Returns:
        The frames in RGB, in order, of one size: all of a list or an array, at most `MAX_FRAMES`
        of an encoded video.

    Raises:
        DataError: If there is no frame, one cannot be opened, their sizes differ, or nothing that
            is installed decodes the video.
    """
    video = encoded(video)
    if isinstance(video, bytes | str | os.PathLike):
        frames = _decoded(video)
    elif isinstance(video, np.ndarray):
        if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8:
            raise DataError(
                "A video as an array must be uint8 of the shape (frames, height, width, 3), got "
                f"{video.dtype} of {video.shape}."
            )
        frames = [Image.fromarray(frame) for frame in video]
    elif isinstance(video, Sequence):
        frames = [load_image(frame) for frame in video]
    else:
        raise DataError(
            "A video must be a list of frames, an array of them, encoded bytes, a path, or "
            f"{{'bytes', 'path'}}; got {type(video).__name__}."
        )
    if not frames:
        raise DataError("A video must have a frame; this one has none.")
    sizes = {frame.size for frame in frames}
    if len(sizes) > 1:
        raise DataError(f"The frames of a video must have one size, got {sorted(sizes)}.")
    return frames


def encoded(value: Any) -> Any:
    """Return what a struct of ``bytes`` and ``path`` holds, any other value as it is."""
    if isinstance(value, Mapping):
        content = value.get("bytes")
        return content if content is not None else value.get("path")
    return value


def _decoded(video: bytes | str | os.PathLike[str]) -> list[Image.Image]:
    try:
        with Image.open(io.BytesIO(video) if isinstance(video, bytes) else video) as animation:
            wanted = set(_spaced(getattr(animation, "n_frames", 1)))
            # Frames build on those before them: all are gone through, the wanted are kept.
            return [
                _in_rgb(frame)
                for number, frame in enumerate(ImageSequence.Iterator(animation))
                if number in wanted
            ]
    except UnidentifiedImageError:
        return _decoded_film(video)
    except Exception as error:
        raise DataError(f"A video cannot be opened: {error}") from error


def _decoded_film(video: bytes | str | os.PathLike[str]) -> list[Image.Image]:
    backend = next((name for name, module in DECODERS.items() if _installed(module)), None)
    if backend is None:
        raise DataError(
            "Videos that are not animated images need a decoder, and none of "
            f"{', '.join(DECODERS.values())} is installed: pip install av, or give each video as "
            "a list of its frames."
        )
    with _as_file(video) as path:
        try:
            frames, _ = load_video(
                path,
                backend=backend,
                sample_indices_fn=lambda metadata, **_: np.array(
                    _spaced(metadata.total_num_frames), dtype=int
                ),
            )
        except Exception as error:  # every decoder raises types of its own
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"A video cannot be decoded by {backend}: {reason}") from error
    return [Image.fromarray(np.asarray(frame)) for frame in frames]


def _spaced(total: int) -> list[int]:
    """Return at most `MAX_FRAMES` of ``total`` numbers, evenly spaced, both ends among them."""
    count = min(total, MAX_FRAMES)
    return [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]


def _installed(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


@contextmanager
def _as_file(video: bytes | str | os.PathLike[str]) -> Iterator[str]:
    if not isinstance(video, bytes):
        yield os.fspath(video)
        return
    with tempfile.NamedTemporaryFile(suffix=".video") as file:
        file.write(video)
        file.flush()
        yield file.name
