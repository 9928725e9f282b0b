"""Generated clips of moving shapes, with questions about colour, kind, direction and order.

Two shapes appear one after the other, each for half of the clip, and each moves one way. Direction
and order cannot be told from any single frame.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from lessons import Lesson
from PIL import Image

from hf_adaptive_sparse.demo.pictures import (
    COLOURS,
    IMAGE_SIZE,
    KINDS,
    Scene,
    Shape,
    draw_scene,
    make_scene,
)
from hf_adaptive_sparse.demo.scenes import ask, describe

FRAMES = 6
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
ORDER = ("first", "last")

_STEP = 12
_RADIUS = 9


@dataclass(frozen=True)
class Event:
    """A shape that crosses the picture; ``across`` is where on the other axis, in pixels."""

    colour: str
    kind: str
    direction: str
    across: int


def make_clip(rng: random.Random) -> tuple[list[Image.Image], list[Event]]:
    """Draw a clip of `FRAMES` frames, and say what happens in it."""
    colours, kinds = rng.sample(list(COLOURS), 2), rng.sample(KINDS, 2)
    events = [
        Event(colour, kind, rng.choice(list(DIRECTIONS)), rng.randint(14, IMAGE_SIZE - 14))
        for colour, kind in zip(colours, kinds, strict=True)
    ]
    level = rng.randint(10, 60)
    ground = (level + rng.randint(0, 30), level + rng.randint(0, 30), level + rng.randint(0, 30))
    each = FRAMES // len(events)
    frames = [
        draw_scene(Scene((_shape(event, time - each // 2),), ground))
        for event in events
        for time in range(each)
    ]
    return frames, events


def _shape(event: Event, time: int) -> Shape:
    dx, dy = DIRECTIONS[event.direction]
    middle = IMAGE_SIZE // 2
    x = middle + time * _STEP * dx if dx else event.across
    y = middle + time * _STEP * dy if dy else event.across
    return Shape(
        colour=event.colour,
        kind=event.kind,
        column=int(x >= middle),
        row=int(y >= middle),
        x=x,
        y=y,
        radius=_RADIUS,
        rgb=COLOURS[event.colour],
    )


def ask_clip(events: list[Event], rng: random.Random) -> tuple[str, str]:
    """Ask one question about a clip; the answer is one word."""
    index = rng.randrange(len(events))
    event, order = events[index], ORDER[index]
    name = rng.choice((f"{event.colour} shape", event.kind))
    return rng.choice(
        (
            (f"Which colour comes {order}?", event.colour),
            (f"Which shape comes {order}?", event.kind),
            (f"Which way does the {name} move?", event.direction),
            (f"Which way does the {order} shape move?", event.direction),
            (f"What colour is the {event.kind}?", event.colour),
        )
    )


def clip_lesson(rng: random.Random, questions: int) -> Lesson:
    """Make a clip with questions and a description of what happens."""
    frames, events = make_clip(rng)
    told = [
        (*rng.sample((e.colour, e.kind), 2), e.direction, order)
        for e, order in zip(events, ORDER, strict=True)
    ]
    rng.shuffle(told)
    return Lesson("video", frames, [ask_clip(events, rng) for _ in range(questions)], told)


def picture_lesson(rng: random.Random, questions: int) -> Lesson:
    """Make a picture of the demo's, with its questions and its description."""
    scene = make_scene(rng)
    asked = [ask(scene, rng) for _ in range(questions)]
    return Lesson("image", draw_scene(scene), asked, describe(scene, rng))
