"""A few hundred executions of every fuzz target; ``benchmarks/fuzz.py`` does a million."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import targets


@pytest.mark.parametrize("name", targets.TARGETS)
def test_bad_bytes_are_refused_and_nothing_else_happens(name: str) -> None:
    rng = random.Random(name)
    accepted = [
        targets.run(name, rng.randbytes(rng.randrange(80)), measure_memory=i % 20 == 0)
        for i in range(400)
    ]
    # A target that accepts nothing, or everything, would test nothing.
    assert 0 < sum(accepted) < len(accepted)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_inputs_that_hypothesis_finds(name: str) -> None:
    @settings(max_examples=60, deadline=None, database=None)
    @given(st.binary(max_size=200))
    def execute(data: bytes) -> None:
        targets.run(name, data)

    execute()
