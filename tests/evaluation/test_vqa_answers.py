from __future__ import annotations

import pytest

from hf_adaptive_sparse.evaluation.vqa_answers import mean_agreement, normalize_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("two", "2"),
        ("none", "0"),
        ("Ten", "10"),
        ("eleven", "eleven"),
        ("a dog", "dog"),
        ("The an a", ""),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yall'll", "y'all'll"),
        ("ow's'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),
        ("its", "its"),
        ("well", "well"),
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("1,000", "1000"),
        ("100,978", "100978"),
        ("red, white", "red white"),
        ("red,white", "red white"),
        ("top-left", "top left"),
        ("top - left", "top left"),
        ("yes.", "yes"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("u.s.", "us"),
        ("what?!", "what"),
        ("one\ntwo\tthree ", "1 2 3"),
        ("", ""),
        (" it's   a  cat ", "it's cat"),
        ('"stop"', "stop"),
    ],
)
def test_published_rules(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("matching", "expected"),
    # Leaving one out: the matching ones see one match less than the others do.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_soft_accuracy(matching: int, expected: float) -> None:
    matches = [True] * matching + [False] * (10 - matching)
    assert mean_agreement(matches) == pytest.approx(expected)


def test_single_answer_is_exact_match() -> None:
    assert mean_agreement([True]) == 1.0
    assert mean_agreement([False]) == 0.0
