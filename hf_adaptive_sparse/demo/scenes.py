"""Questions about generated pictures and prose to go with them, in memory or as parquet.

Everything is drawn from a seeded `random.Random`, so a seed gives the same pictures, questions,
answers and lines everywhere. Seeds below `HELD_OUT_SEEDS` belong to training, the others to
calibration and evaluation.
"""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from PIL import Image

from hf_adaptive_sparse.demo.pictures import (
    COLOURS,
    COLUMNS,
    KINDS,
    ROWS,
    Scene,
    Shape,
    draw_scene,
    make_scene,
)
from hf_adaptive_sparse.demo.prose import make_text

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "CALIBRATION_SEED",
    "EVALUATION_SEED",
    "HELD_OUT_SEEDS",
    "SPLITS",
    "VisualQuestion",
    "ask",
    "describe",
    "make_text",
    "make_visual_questions",
    "write_parquet",
]

HELD_OUT_SEEDS = 1_000_000_000
"""Training uses seeds below this number, held-out data only seeds from it on."""
CALIBRATION_SEED = HELD_OUT_SEEDS + 1
EVALUATION_SEED = HELD_OUT_SEEDS + 2
SPLITS = {"calibration": CALIBRATION_SEED, "evaluation": EVALUATION_SEED}

NUMBERS = ("zero", "one", "two", "three")


class VisualQuestion(TypedDict):
    """One row: an RGB picture, a question about it and its answer, one lower-case word."""

    image: Image.Image
    question: str
    answer: str


_Asker = Callable[[Scene, random.Random], tuple[str, str] | None]


def _unique(scene: Scene, attribute: str) -> list[Shape]:
    """List the shapes whose `attribute` no other shape of the scene has."""
    values = [getattr(shape, attribute) for shape in scene.shapes]
    return [shape for shape in scene.shapes if values.count(getattr(shape, attribute)) == 1]


def _ask_colour(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    shapes = _unique(scene, "kind")
    if not shapes:
        return None
    shape = rng.choice(shapes)
    return f"What colour is the {shape.kind}?", shape.colour


def _ask_kind(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    shapes = _unique(scene, "colour")
    if not shapes:
        return None
    shape = rng.choice(shapes)
    return f"Which shape is {shape.colour}?", shape.kind


def _ask_presence(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    if rng.random() < 0.5:
        options, present = list(COLOURS), {shape.colour for shape in scene.shapes}
        template = "Is there a {} shape?"
    else:
        options, present = list(KINDS), {shape.kind for shape in scene.shapes}
        template = "Is there a {}?"
    # Both answers are equally likely, whatever the scene.
    answer = rng.choice(("yes", "no"))
    value = rng.choice([option for option in options if (option in present) == (answer == "yes")])
    return template.format(value), answer


def _ask_total(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    return "How many shapes are there?", NUMBERS[len(scene.shapes)]


def _ask_count(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    if rng.random() < 0.5:
        colour = rng.choice(scene.shapes).colour
        count = sum(shape.colour == colour for shape in scene.shapes)
        return f"How many {colour} shapes are there?", NUMBERS[count]
    kind = rng.choice([*KINDS, *(shape.kind for shape in scene.shapes)])
    plural = "crosses" if kind == "cross" else f"{kind}s"
    count = sum(shape.kind == kind for shape in scene.shapes)
    return f"How many {plural} are there?", NUMBERS[count]


def _ask_side(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    if rng.random() < 0.5:
        shapes = _unique(scene, "colour")
        names = [f"{shape.colour} shape" for shape in shapes]
    else:
        shapes = _unique(scene, "kind")
        names = [shape.kind for shape in shapes]
    if not shapes:
        return None
    index = rng.randrange(len(shapes))
    if rng.random() < 0.5:
        return f"Is the {names[index]} left or right?", COLUMNS[shapes[index].column]
    return f"Is the {names[index]} at the top or bottom?", ROWS[shapes[index].row]


_ASKERS: tuple[_Asker, ...] = (
    _ask_colour,
    _ask_kind,
    _ask_presence,
    _ask_total,
    _ask_count,
    _ask_side,
)


def ask(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Ask one random question that the scene answers.

    Returns:
        Question and answer; the answer is one lower-case word.
    """
    while True:
        asked = rng.choice(_ASKERS)(scene, rng)
        if asked is not None:
            return asked


def describe(scene: Scene, rng: random.Random) -> list[tuple[str, str, str, str]]:
    """Describe the shapes of a scene in random order, as (known, told, column, row).

    The known word is a colour or kind that only this shape has, the told word its other one;
    a shape that shares both is left out.
    """
    described = []
    shapes = list(scene.shapes)
    rng.shuffle(shapes)
    for shape in shapes:
        place = (COLUMNS[shape.column], ROWS[shape.row])
        orders = []
        if shape in _unique(scene, "colour"):
            orders.append((shape.colour, shape.kind, *place))
        if shape in _unique(scene, "kind"):
            orders.append((shape.kind, shape.colour, *place))
        if orders:
            described.append(rng.choice(orders))
    return described


def make_visual_questions(count: int, seed: int) -> list[VisualQuestion]:
    """Make questions about generated pictures, one question per picture.

    Args:
        count: Number of questions, at least 0.
        seed: Decides everything; see `HELD_OUT_SEEDS` for which seeds training uses.

    Returns:
        Dicts of `image` (RGB, 48 × 48 pixels), `question` and `answer` (one word).

    Raises:
        ValueError: `count` is negative.
    """
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    rng = random.Random(f"scenes-{seed}")
    rows: list[VisualQuestion] = []
    for _ in range(count):
        scene = make_scene(rng)
        question, answer = ask(scene, rng)
        rows.append({"image": draw_scene(scene), "question": question, "answer": answer})
    return rows


def write_parquet(
    directory: str | Path,
    *,
    text_lines: int = 2000,
    visual_questions: int = 512,
    seed: int = 0,
) -> dict[str, Path]:
    """Write text and visual questions as parquet, in the columns of the usual Hub datasets.

    Leaves `text/calibration.parquet`, `text/evaluation.parquet` (column `text`, one paragraph per
    row) and `visual/calibration.parquet`, `visual/evaluation.parquet` (columns `question_id`,
    `image_id`, `image` as a struct of PNG `bytes` and `path`, `question`, `answer`; one question
    per picture). Files of these names are replaced.

    Args:
        directory: Where to write; made if absent.
        text_lines: Paragraphs per split, about 80 tokens each.
        visual_questions: Questions per split.
        seed: Other values give other held-out data; none of them meets training's or, below
            1,000,000, another split's.

    Returns:
        Paths by "text/calibration", "text/evaluation", "visual/calibration", "visual/evaluation".

    Raises:
        ValueError: a count is negative, or `seed` is outside 0 … 999,999.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not 0 <= seed < 1_000_000:
        raise ValueError(f"seed must be from 0 to 999999, got {seed}")
    directory = Path(directory)
    written: dict[str, Path] = {}
    for split, split_seed in SPLITS.items():
        data_seed = split_seed + len(SPLITS) * seed
        tables = {
            "text": pa.table({"text": make_text(text_lines, data_seed)}),
            "visual": _visual_table(make_visual_questions(visual_questions, data_seed)),
        }
        for name, table in tables.items():
            path = directory / name / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path)
            written[f"{name}/{split}"] = path
    return written


def _visual_table(rows: list[VisualQuestion]) -> "pa.Table":
    import pyarrow as pa

    images = []
    for index, row in enumerate(rows):
        buffer = io.BytesIO()
        row["image"].save(buffer, format="PNG")
        images.append({"bytes": buffer.getvalue(), "path": f"{index}.png"})
    value_types = {"question_id": "int64", "image_id": "int64", "question": "string"}
    features = {name: {"dtype": kind, "_type": "Value"} for name, kind in value_types.items()}
    features |= {"image": {"_type": "Image"}, "answer": {"dtype": "string", "_type": "Value"}}
    schema = pa.schema(
        [
            ("question_id", pa.int64()),
            ("image_id", pa.int64()),
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("question", pa.string()),
            ("answer", pa.string()),
        ],
        # What makes `datasets` decode the struct as a picture.
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    columns = {
        "question_id": list(range(len(rows))),
        "image_id": list(range(len(rows))),
        "image": images,
        "question": [row["question"] for row in rows],
        "answer": [row["answer"] for row in rows],
    }
    return pa.table(columns, schema=schema)
