"""The official scoring of each benchmark, on examples worked by hand."""

from __future__ import annotations

import math

import pytest

from hf_adaptive_sparse.evaluation.tasks.scienceqa import ScienceQA, chosen, lettered_question
from hf_adaptive_sparse.evaluation.tasks.soft_accuracy import TextVQA, VQAv2
from hf_adaptive_sparse.evaluation.tasks.task import find_task, register_task
from hf_adaptive_sparse.evaluation.tasks.wikitext2 import WikiText2


@pytest.mark.parametrize(
    ("said", "humans", "expected"),
    [
        # "min(#humans that said that answer / 3, 1)", averaged over the ten ways to leave one out.
        ("yes", ["yes"] * 10, 1.0),
        ("yes", ["yes"] * 4 + ["no"] * 6, 1.0),
        ("yes", ["yes"] * 3 + ["no"] * 7, (3 * 2 / 3 + 7) / 10),
        ("yes", ["yes"] * 2 + ["no"] * 8, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("yes", ["yes"] + ["no"] * 9, (0 + 9 * 1 / 3) / 10),
        ("yes", ["no"] * 10, 0.0),
    ],
)
def test_soft_accuracy_leaves_one_human_out(said: str, humans: list[str], expected: float) -> None:
    content = {"answers": humans}
    assert VQAv2().score(said, content)["score"] == pytest.approx(expected)
    assert TextVQA().score(said, content)["score"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "vqav2", "textvqa"),
    [
        ("Two dogs.", "2 dogs", "2 dogs"),
        ("joe's", "joe's", "joe 's"),
        ("red,white", "red white", "redwhite"),
        ("1,000", "1000", "1000"),
        ("Coca-Cola?", "coca cola", "coca cola"),
        ("the dont", "don't", "don't"),
    ],
)
def test_normalisation_differs_between_the_two(text: str, vqav2: str, textvqa: str) -> None:
    assert VQAv2().normalize(text) == vqav2
    assert TextVQA().normalize(text) == textvqa


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", 1),
        ("b", 1),
        ("B.", 1),
        ("(B)", 1),
        ("B) a fern", 1),
        ("B: a fern", 1),
        ("The answer is B.", 1),
        ("the answer is: (b)", 1),
        ("A fern", 1),
        ("a fern.", 1),
        ("moss", 0),
        ("D", None),
        ("", None),
        ("ferns grow", None),
        ("An answer", None),
    ],
)
def test_an_answer_names_a_choice(answer: str, expected: int | None) -> None:
    assert chosen(answer, ["moss", "a fern", "pine"]) == expected


def test_a_text_that_two_choices_share_names_none() -> None:
    assert chosen("red", ["red", "Red.", "blue"]) is None


def test_scienceqa_counts_images_apart_and_what_names_no_choice() -> None:
    task = ScienceQA()
    with_image = {"image": b"", "choices": ["x", "y"], "answer": 1}
    without = {"image": None, "choices": ["x", "y"], "answer": 0}
    said = [("B", with_image), ("A", with_image), ("A", without), ("perhaps", without)]
    outcomes = [{"answer": a, "ended": True, **task.score(a, content)} for a, content in said]
    figures = task.figures([*outcomes, {**outcomes[2], "ended": False}])
    assert figures.value == pytest.approx(3 / 5)
    assert figures.details == {
        "ended_ratio": 0.8,
        "no_choice_ratio": 0.2,
        "accuracy_with_image": 0.5,
        "accuracy_without_image": pytest.approx(2 / 3),
    }
    assert figures.standard_error == pytest.approx(math.sqrt(0.3 / 5))


def test_the_lettered_question() -> None:
    assert lettered_question(" Which? ", ["x", "y"], " It rains. ") == (
        "Context: It rains.\nWhich?\nA. x\nB. y"
    )
    assert lettered_question("Which?", ["x"], "") == "Which?\nA. x"


def test_perplexity_is_weighted_by_tokens() -> None:
    outcomes = [{"nll": 2.0, "tokens": 1}, {"nll": 3.0, "tokens": 9}]
    figures = WikiText2().figures(outcomes)
    assert figures.value == pytest.approx(math.exp(0.5))
    assert figures.details == {"tokens": 10}
    assert WikiText2().figures(outcomes[:1]).standard_error is None


def test_a_loss_that_overflows_is_an_infinite_perplexity() -> None:
    assert WikiText2().figures([{"nll": 8000.0, "tokens": 10}]).value == math.inf


def test_unknown_and_taken_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one of scienceqa, textvqa, vqav2, wikitext2; got 'vqa'"):
        find_task("vqa")
    with pytest.raises(ValueError, match="'vqav2' is registered already"):
        register_task(VQAv2)
