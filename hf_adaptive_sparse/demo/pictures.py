"""Pictures of coloured shapes on plain ground, described first and drawn from the description.

A scene has one to three shapes, each in its own quarter of the picture.
"""

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

IMAGE_SIZE = 48
"""Height and width of every picture, in pixels."""

COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 175, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 215, 50),
    "purple": (150, 50, 180),
    "white": (240, 240, 240),
}
KINDS = ("circle", "square", "triangle", "cross")
COLUMNS = ("left", "right")
ROWS = ("top", "bottom")

_QUARTER = IMAGE_SIZE // 2


@dataclass(frozen=True)
class Shape:
    """One shape; `column` and `row` are 0 or 1, `x`, `y` its centre and `radius` in pixels."""

    colour: str
    kind: str
    column: int
    row: int
    x: int
    y: int
    radius: int
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """One to three shapes in different quarters, on ground of one colour."""

    shapes: tuple[Shape, ...]
    ground: tuple[int, int, int]


def make_scene(rng: random.Random) -> Scene:
    """Draw a random scene description with one to three shapes."""
    quarters = rng.sample([(0, 0), (0, 1), (1, 0), (1, 1)], rng.randint(1, 3))
    shapes = []
    for column, row in quarters:
        colour = rng.choice(list(COLOURS))
        radius = rng.randint(9, 10)
        red, green, blue = (
            min(255, max(0, level + rng.randint(-12, 12))) for level in COLOURS[colour]
        )
        shapes.append(
            Shape(
                colour=colour,
                kind=rng.choice(KINDS),
                column=column,
                row=row,
                x=_QUARTER * column + _QUARTER // 2 + rng.randint(-1, 1),
                y=_QUARTER * row + _QUARTER // 2 + rng.randint(-1, 1),
                radius=radius,
                rgb=(red, green, blue),
            )
        )
    level = rng.randint(10, 60)
    ground = (level + rng.randint(0, 30), level + rng.randint(0, 30), level + rng.randint(0, 30))
    return Scene(tuple(shapes), ground)


def draw_scene(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB picture of `IMAGE_SIZE` × `IMAGE_SIZE` pixels."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), scene.ground)
    pen = ImageDraw.Draw(image)
    for shape in scene.shapes:
        x, y, radius = shape.x, shape.y, shape.radius
        if shape.kind == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shape.rgb)
        elif shape.kind == "square":
            side = radius - 1
            pen.rectangle((x - side, y - side, x + side, y + side), fill=shape.rgb)
        elif shape.kind == "triangle":
            corners = [(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)]
            pen.polygon(corners, fill=shape.rgb)
        else:
            bar = max(1, radius // 4)
            pen.rectangle((x - bar, y - radius, x + bar, y + radius), fill=shape.rgb)
            pen.rectangle((x - radius, y - bar, x + radius, y + bar), fill=shape.rgb)
    return image
