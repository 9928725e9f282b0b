"""Generated beeps, with questions about their number, their pitch and their order."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from lessons import Lesson

SAMPLING_RATE = 16_000
SECONDS = 2
PITCHES = {"low": 300.0, "middle": 800.0, "high": 2000.0}
"""Hertz; each beep is up to a tenth higher or lower."""
COUNTS = ("one", "two", "three", "four")
ORDINALS = ("first", "second", "third", "fourth")


def make_sound(rng: random.Random) -> tuple[np.ndarray[Any, Any], list[str]]:
    """Make a sound of one to four beeps.

    Returns:
        ``(samples,)`` float32 in [-1, 1], and the pitch of each beep in order.
    """
    pitches = [rng.choice(list(PITCHES)) for _ in range(rng.randint(1, len(COUNTS)))]
    noise = np.random.default_rng(rng.randrange(1 << 32))
    sound = 0.01 * noise.standard_normal(SAMPLING_RATE * SECONDS)
    slot = len(sound) // len(COUNTS)
    for index, pitch in enumerate(pitches):
        length = round(rng.uniform(0.22, 0.34) * SAMPLING_RATE)
        start = index * slot + rng.randint(0, slot - length)
        times = np.arange(length) / SAMPLING_RATE
        hertz = PITCHES[pitch] * rng.uniform(0.9, 1.1)
        loudness = rng.uniform(0.2, 0.6) * np.hanning(length) ** 0.25
        sound[start : start + length] += loudness * np.sin(2 * np.pi * hertz * times)
    return sound.astype(np.float32), pitches


def ask_sound(pitches: list[str], rng: random.Random) -> tuple[str, str]:
    """Ask one question about a sound; the answer is one word."""
    options = [
        ("How many beeps are there?", COUNTS[len(pitches) - 1]),
        ("Which beep comes first?", pitches[0]),
        ("Which beep comes last?", pitches[-1]),
    ]
    first, last = (list(PITCHES).index(pitches[end]) for end in (0, -1))
    if first != last:
        options.append(("Does the pitch go up or down?", "up" if last > first else "down"))
    return rng.choice(options)


def sound_lesson(rng: random.Random, questions: int) -> Lesson:
    """Make a sound with questions and a description of its beeps."""
    sound, pitches = make_sound(rng)
    told = list(zip(ORDINALS, pitches, strict=False))
    value = {"array": sound, "sampling_rate": SAMPLING_RATE}
    return Lesson("audio", value, [ask_sound(pitches, rng) for _ in range(questions)], told)
