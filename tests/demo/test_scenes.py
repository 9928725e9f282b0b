"""The generators: seeded, held-out data apart from training's, answers the pictures bear out."""

import random
import re

import datasets
import pytest

from hf_adaptive_sparse.demo import batches, pictures, scenes
from hf_adaptive_sparse.demo.prose import make_text
from hf_adaptive_sparse.demo.world import NUMBERS, WORLD


def picture_rows(rows: list[scenes.VisualQuestion]) -> list[tuple[bytes, str, str]]:
    return [(row["image"].tobytes(), row["question"], row["answer"]) for row in rows]


def test_a_seed_gives_the_same_questions_and_another_seed_others() -> None:
    first = picture_rows(scenes.make_visual_questions(50, seed=7))
    assert first == picture_rows(scenes.make_visual_questions(50, seed=7))
    assert first != picture_rows(scenes.make_visual_questions(50, seed=8))


def test_the_generators_say_what_they_said_when_the_model_was_trained() -> None:
    # Pinned: the bundled model knows this world only, so a change here calls for a new model.
    asked = [(row["question"], row["answer"]) for row in scenes.make_visual_questions(3, seed=0)]
    assert asked == [
        ("How many green shapes are there?", "one"),
        ("Is there a white shape?", "no"),
        ("Is the triangle left or right?", "right"),
    ]
    assert make_text(1, seed=0) == [
        "Two gloves cost 74 pence. Casper saw seven heavy curtains, three rough buckets. Casper "
        "and Werner packed eleven big chests and named the crooked well. Three brown cats by the "
        "gate stretch often."
    ]


def test_text_is_seeded_too() -> None:
    assert make_text(20, seed=3) == make_text(20, seed=3)
    assert make_text(20, seed=3) != make_text(20, seed=4)


def test_fewer_rows_are_the_beginning_of_more() -> None:
    assert make_text(5, seed=1) == make_text(9, seed=1)[:5]
    few = picture_rows(scenes.make_visual_questions(5, seed=1))
    assert few == picture_rows(scenes.make_visual_questions(9, seed=1))[:5]


def test_training_seeds_never_reach_the_held_out_ones() -> None:
    highest = batches.training_seed(seed=99, chunk=9_999_999)
    assert highest < scenes.HELD_OUT_SEEDS
    assert min(scenes.SPLITS.values()) >= scenes.HELD_OUT_SEEDS
    assert batches.training_seed(0, 9_999_999) < batches.training_seed(1, 0)
    with pytest.raises(ValueError, match="seed must be from 0 to 99, got 100"):
        batches.training_seed(seed=100, chunk=0)
    with pytest.raises(ValueError, match="chunk must be"):
        batches.training_seed(seed=0, chunk=10_000_000)


def test_held_out_pictures_and_paragraphs_do_not_occur_in_training() -> None:
    held_out = scenes.make_visual_questions(300, scenes.EVALUATION_SEED)
    calibration = scenes.make_visual_questions(300, scenes.CALIBRATION_SEED)
    seen = set()
    for step in range(100):
        rng = random.Random(f"questions-{batches.training_seed(0, step)}")
        seen |= {pictures.draw_scene(pictures.make_scene(rng)).tobytes() for _ in range(12)}
    assert not seen & {row["image"].tobytes() for row in held_out + calibration}
    assert not {r["image"].tobytes() for r in held_out} & {
        r["image"].tobytes() for r in calibration
    }
    told = {line for step in range(20) for line in make_text(100, step)}
    assert not told & set(make_text(500, scenes.EVALUATION_SEED))


def test_answers_are_single_lower_case_words() -> None:
    rows = scenes.make_visual_questions(500, seed=5)
    assert all(row["answer"].isalpha() and row["answer"].islower() for row in rows)
    assert {row["image"].size for row in rows} == {(48, 48)}
    assert {row["image"].mode for row in rows} == {"RGB"}
    assert len({row["answer"] for row in rows}) == 20  # every answer there is


def shape_at(colour: str, kind: str, column: int, row: int) -> pictures.Shape:
    return pictures.Shape(
        colour, kind, column, row, 12 + 24 * column, 12 + 24 * row, 9, pictures.COLOURS[colour]
    )


def test_every_question_about_a_known_scene_is_answered_right() -> None:
    scene = pictures.Scene(
        (
            shape_at("red", "circle", 0, 0),
            shape_at("red", "cross", 1, 0),
            shape_at("blue", "circle", 1, 1),
        ),
        ground=(20, 20, 20),
    )
    rng = random.Random(0)
    answers = dict(scenes.ask(scene, rng) for _ in range(2000))
    right = {
        "What colour is the cross?": "red",
        "Which shape is blue?": "circle",
        "Is there a red shape?": "yes",
        "Is there a green shape?": "no",
        "Is there a cross?": "yes",
        "Is there a square?": "no",
        "How many shapes are there?": "three",
        "How many red shapes are there?": "two",
        "How many circles are there?": "two",
        "How many squares are there?": "zero",
        "Is the cross left or right?": "right",
        "Is the cross at the top or bottom?": "top",
        "Is the blue shape at the top or bottom?": "bottom",
    }
    assert {question: answers[question] for question in right} == right
    # What the scene leaves open is not asked.
    assert "What colour is the circle?" not in answers
    assert "Which shape is red?" not in answers
    assert not any(question.startswith("Is the red shape") for question in answers)


def test_shapes_are_drawn_where_and_in_the_colour_they_say() -> None:
    rng = random.Random(2)
    for _ in range(50):
        scene = pictures.make_scene(rng)
        image = pictures.draw_scene(scene)
        for shape in scene.shapes:
            assert image.getpixel((shape.x, shape.y)) == shape.rgb
            assert (shape.x // 24, shape.y // 24) == (shape.column, shape.row)


def test_text_agrees_with_the_world_and_its_grammar() -> None:
    text = " ".join(make_text(2000, seed=11))
    words = set(text.replace(".", " ").replace(",", " ").replace('"', " ").split())
    assert len(words) > 350
    person = WORLD.people[0]
    assert f"{person.name} is a {person.trade} from {person.town.name}." in text
    assert f"{person.name} is a" in text
    assert text.count(f"{person.name} is a") == text.count(
        f"{person.name} is a {person.trade} from {person.town.name}."
    )
    # Agreement holds at a distance: the inner verb follows the nearer noun, the outer the first.
    for plural, singular in (("geese", "dog"), ("mice", "ox")):
        for verb in ("follow", "lead", "fear", "know"):
            assert f"The {plural} that the {singular} {verb} " not in text
            assert f"The {singular} that the {plural} {verb}s " not in text
    assert not {"watchs", "flys", "hisse", "boxs", "torchs"} & words


def test_sums_and_prices_come_out() -> None:
    text = " ".join(make_text(500, seed=12))
    numbers = {word: value for value, word in enumerate(NUMBERS)}
    sums = re.findall(r"bought (\w+) \w+, then (\w+) more: (\w+)\.", text)
    assert len(sums) > 50
    assert all(numbers[a] + numbers[b] == numbers[c] for a, b, c in sums)
    prices = re.findall(r"(One|Two|Three|Four) (\w+) costs? (\d+) pence", text)
    assert len(prices) > 50
    each = WORLD.price_of
    for amount, noun, total in prices:
        thing = noun if noun in each else noun.removesuffix("s")
        thing = thing if thing in each else noun.removesuffix("es")
        assert numbers[amount.lower()] * each[thing] == int(total)


@pytest.mark.parametrize("make", [make_text, scenes.make_visual_questions])
def test_counts_of_zero_and_below(make) -> None:
    assert make(0, 1) == []
    with pytest.raises(ValueError, match="must be at least 0, got -1"):
        make(-1, 1)


def test_parquet_reads_back_as_the_hub_layout(tmp_path) -> None:
    paths = scenes.write_parquet(tmp_path / "new", text_lines=6, visual_questions=5)
    assert set(paths) == {
        f"{kind}/{split}" for kind in ("text", "visual") for split in ("calibration", "evaluation")
    }
    cache = str(tmp_path / "cache")
    text = datasets.Dataset.from_parquet(str(paths["text/evaluation"]), cache_dir=cache)
    assert list(text["text"]) == make_text(6, scenes.EVALUATION_SEED)
    visual = datasets.Dataset.from_parquet(str(paths["visual/calibration"]), cache_dir=cache)
    assert visual.column_names == ["question_id", "image_id", "image", "question", "answer"]
    assert isinstance(visual.features["image"], datasets.Image)
    rows = scenes.make_visual_questions(5, scenes.CALIBRATION_SEED)
    assert [(r["image"].tobytes(), r["question"], r["answer"]) for r in visual] == picture_rows(
        rows
    )


def test_parquet_of_another_seed_differs_and_a_bad_seed_is_refused(tmp_path) -> None:
    first = scenes.write_parquet(tmp_path / "a", text_lines=3, visual_questions=3)
    again = scenes.write_parquet(tmp_path / "b", text_lines=3, visual_questions=3)
    other = scenes.write_parquet(tmp_path / "c", text_lines=3, visual_questions=3, seed=1)
    contents = [{k: p.read_bytes() for k, p in paths.items()} for paths in (first, again, other)]
    assert contents[0] == contents[1]
    assert all(contents[0][key] != contents[2][key] for key in contents[0])
    assert len(set(contents[0].values()) | set(contents[2].values())) == 8
    with pytest.raises(ValueError, match="seed must be from 0 to 999999, got -1"):
        scenes.write_parquet(tmp_path / "d", seed=-1)


def test_captions_tell_each_distinct_shape_once() -> None:
    red, cross = shape_at("red", "circle", 0, 0), shape_at("blue", "cross", 1, 1)
    rng = random.Random(0)
    told = {
        tuple(sorted(scenes.describe(pictures.Scene((red, cross), (0, 0, 0)), rng)))
        for _ in range(100)
    }
    words = {word for caption in told for item in caption for word in item[:2]}
    assert words == {"red", "circle", "blue", "cross"}
    assert all(len(caption) == 2 for caption in told)
    assert {item[2:] for caption in told for item in caption} == {
        ("left", "top"),
        ("right", "bottom"),
    }
    twins = pictures.Scene((red, shape_at("red", "circle", 1, 0)), (0, 0, 0))
    assert scenes.describe(twins, rng) == []
