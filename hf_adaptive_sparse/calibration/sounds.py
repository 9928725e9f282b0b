"""Open sounds, in any form that a row may hold, at a model's sampling rate."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np

from hf_adaptive_sparse.calibration.pictures import encoded
from hf_adaptive_sparse.calibration.tables import DataError


def load_sound(sound: Any, sampling_rate: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Open a sound of a record.

    Args:
        sound: ``{"array": ..., "sampling_rate": ...}`` as `datasets` gives it, a decoder of
            torchcodec, encoded bytes, a path, or ``{"bytes": ..., "path": ...}``. WAV is read by
            scipy, other formats by soundfile where it is installed.
        sampling_rate: Samples per second that are wanted; others are resampled.

    Returns:
        ``(samples,)``, float32 in [-1, 1]: the mean of its channels.

    Raises:
        DataError: If it cannot be opened, or is empty or not finite.
    """
    samples, rate = _samples(sound)
    if samples.ndim == 2:  # (channels, samples) or (samples, channels); channels are few
        samples = samples.mean(axis=int(np.argmin(samples.shape)))
    if samples.ndim != 1 or samples.size == 0:
        raise DataError(
            "A sound must have the shape (samples,) or (channels, samples), none of them 0, got "
            f"{samples.shape}."
        )
    if not np.isfinite(samples).all():
        raise DataError("The samples of a sound must be finite; some are NaN or infinite.")
    number = isinstance(rate, Real) and not isinstance(rate, bool) and math.isfinite(rate)
    if not number or rate < 1 or rate != int(rate):
        raise DataError(
            f"sampling_rate must be a whole number >= 1, got {rate!r}. Give the samples per second "
            "that the sound was recorded with, such as 16000."
        )
    if rate != sampling_rate:
        from scipy.signal import resample_poly

        shared = math.gcd(int(rate), sampling_rate)
        samples = resample_poly(samples, sampling_rate // shared, int(rate) // shared)
    return np.ascontiguousarray(samples, dtype=np.float32)


def _samples(sound: Any) -> tuple[np.ndarray[Any, Any], Any]:
    if isinstance(sound, Mapping) and sound.get("array") is not None:
        if sound.get("sampling_rate") is None:
            raise DataError("A sound with an 'array' must have a 'sampling_rate', too.")
        try:
            return np.asarray(sound["array"], dtype=np.float32), sound["sampling_rate"]
        except (TypeError, ValueError) as error:
            raise DataError(f"The 'array' of a sound must hold numbers: {error}") from error
    if hasattr(sound, "get_all_samples"):  # torchcodec's AudioDecoder, what `datasets` decodes to
        decoded = sound.get_all_samples()
        return np.asarray(decoded.data, dtype=np.float32), decoded.sample_rate
    content = encoded(sound)
    if isinstance(content, os.PathLike | str):
        try:
            with open(content, "rb") as file:
                content = file.read()
        except OSError as error:
            raise DataError(f"A sound cannot be opened: {error}") from error
    if not isinstance(content, bytes):
        raise DataError(
            "A sound must be {'array', 'sampling_rate'}, encoded bytes, a path, or {'bytes', "
            f"'path'}}; got {type(content).__name__}."
        )
    return _wav(content) if content[:4] in (b"RIFF", b"RIFX", b"RF64") else _other(content)


def _wav(content: bytes) -> tuple[np.ndarray[Any, Any], int]:
    from scipy.io import wavfile

    try:
        with warnings.catch_warnings():  # chunks of notes and cues, which are skipped
            warnings.simplefilter("ignore", wavfile.WavFileWarning)
            rate, samples = wavfile.read(io.BytesIO(content))
    except Exception as error:  # scipy raises what its parsing happens to meet
        raise DataError(f"A WAV file cannot be read: {error}") from error
    if samples.dtype == np.uint8:  # 8 bits are stored unsigned
        return (samples.astype(np.float32) - 128) / 128, rate
    if np.issubdtype(samples.dtype, np.integer):
        return samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min), rate
    return samples.astype(np.float32), rate


def _other(content: bytes) -> tuple[np.ndarray[Any, Any], int]:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: its native library is missing
        raise DataError(
            "Sounds other than WAV are read by soundfile, which is not installed: pip install "
            "soundfile, or give WAV files or arrays."
        ) from error
    try:
        samples, rate = soundfile.read(io.BytesIO(content), dtype="float32")
    except Exception as error:
        raise DataError(f"A sound cannot be read: {error}") from error
    return samples, rate
