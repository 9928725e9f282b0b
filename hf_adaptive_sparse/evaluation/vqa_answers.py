"""The official normalisation and accuracy of VQA answers (VQA v2, visualqa.org/evaluation).

Written from the published rules: lower case; periods go unless they are decimal points; number
words become digits; articles go; contractions get their apostrophe back; other punctuation except
apostrophe and colon becomes a blank, or nothing where it stands beside a blank; a comma between
digits goes. Both the prediction and the human answers are normalised, as those rules say (the
released script skips unanimous human answers, which are clean already).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = frozenset({"a", "an", "the"})
_DIGITS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}

_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _with_one_apostrophe_missing(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


# "somebody'd" loses its apostrophe in the official table; figures compare only if it does here.
_CONTRACTIONS = {
    short: word for word in _CONTRACTED.split() for short in _with_one_apostrophe_missing(word)
} | {"somebody'd": "somebodyd"}


def normalize_answer(text: str) -> str:
    """Return an answer as the official VQA evaluation compares it.

    Example:
        >>> normalize_answer("Two dogs, a cat.")
        '2 dogs cat'
    """
    text = text.replace("\n", " ").replace("\t", " ").strip().lower()
    cleaned = text
    for mark in _PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        gone = beside_blank or _COMMA_IN_NUMBER.search(text) is not None
        cleaned = cleaned.replace(mark, "" if gone else " ")
    cleaned = _PERIOD.sub("", cleaned)
    words = (_DIGITS.get(word, word) for word in cleaned.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def mean_agreement(matches: Sequence[bool]) -> float:
    """Return the official accuracy of one prediction, in [0, 1].

    With several human answers: for each of them, ``min(matches among the others / 3, 1)``,
    averaged (the official leave-one-out formula; Antol et al. 2015, "VQA", §3). With a single
    answer: 1 if it matches.

    Args:
        matches: Whether each human answer matches the prediction, both normalised; at least one.
    """
    if len(matches) == 1:
        return float(matches[0])
    total = sum(matches)
    return sum(min((total - match) / 3, 1.0) for match in matches) / len(matches)
