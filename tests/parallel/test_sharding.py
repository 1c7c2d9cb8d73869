"""Meshes, and the rounding of batches to them."""

import pytest

from diladiff_jax.parallel import sharding


@pytest.mark.parametrize(
    ("size", "multiple", "expected"), [(1, 8, 8), (8, 8, 8), (9, 8, 16), (5, 1, 5)]
)
def test_round_up_gives_the_next_multiple(size, multiple, expected):
    assert sharding.round_up(size, multiple) == expected
