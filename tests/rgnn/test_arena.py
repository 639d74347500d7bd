"""Where passing values stand in one block: never two at once in the same bytes."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataeff.rgnn.arena import ALIGNMENT, Life, place

steps = st.integers(0, 12)
life = st.builds(lambda a, b, n: Life(min(a, b), max(a, b), n), steps, steps, st.integers(1, 99999))


@given(st.lists(life, max_size=14).map(lambda found: dict(enumerate(found))))
def test_values_alive_together_stand_apart_and_inside(lives):
    places = place(lives)
    spans = {v: (places.offsets[v], places.offsets[v] + n.nbytes) for v, n in lives.items()}
    assert max((end for _, end in spans.values()), default=0) == places.nbytes
    assert all(begin % ALIGNMENT == 0 for begin, _ in spans.values())
    for a, b in itertools.combinations(lives, 2):
        apart = spans[a][1] <= spans[b][0] or spans[b][1] <= spans[a][0]
        assert apart or not lives[a].meets(lives[b])


@pytest.mark.parametrize(
    ("spans", "most"),
    [
        ([(0, 1, 8), (2, 3, 8), (4, 5, 4)], 8),
        ([(0, 2, 8), (2, 3, 8), (3, 5, 4)], 16),
        ([(0, 5, 4), (0, 1, 8), (1, 2, 2), (2, 3, 8)], 14),
        ([(0, 1, 8), (1, 3, 8), (2, 3, 8)], 16),  # into a gap of just its size
    ],
)
def test_values_that_follow_one_another_share_bytes(spans, most):
    lives = {n: Life(a, b, size * ALIGNMENT) for n, (a, b, size) in enumerate(spans)}
    assert place(lives).nbytes == most * ALIGNMENT
