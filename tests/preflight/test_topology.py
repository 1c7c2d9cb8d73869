"""Slices of TPUs: which ones exist, and which of their axes are closed."""

import pytest

from diladiff_jax.preflight import Slice, TopologyError, parse_topology, slice_of


def test_axes_close_along_sixteen_chips_or_in_complete_cubes():
    """With two axes the first holds, with three the second."""
    assert all(Slice("v5p", (4, 4, 8)).closed(axis) for axis in range(3))
    assert not Slice("v5p", (2, 2, 4)).closed(2)
    assert Slice("v5e", (8, 16)).closed(1) and not Slice("v5e", (8, 16)).closed(0)


def test_a_topology_is_a_generation_and_its_sides():
    assert parse_topology("v5p:4x4x8") == Slice("v5p", (4, 4, 8))
    assert parse_topology("v5p:4x4x8").chips == 128


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v9:4x4", "one of v4, v5e"),
        ("v5e", "2 sides separated by x, as in v5e:4x4"),
        ("v5p:4x4", "3 sides"),
        ("v5e:4xx4", "2 sides"),
        ("v5e:4y4", "2 sides"),
        ("v5e:0x4", "2 sides"),
        ("v5e:32x32", "at most 256"),
    ],
)
def test_an_impossible_topology_is_rejected(text, message):
    with pytest.raises(TopologyError, match=message):
        parse_topology(text)


@pytest.mark.parametrize(
    ("generation", "names"),
    [
        ("v5e", {1: "1x1", 16: "4x4", 64: "8x8", 128: "8x16", 256: "16x16"}),
        ("v5p", {16: "2x2x4", 64: "4x4x4", 256: "4x8x8", 1024: "8x8x16"}),
    ],
)
def test_slice_of_makes_the_most_cubic_box(generation, names):
    assert {n: slice_of(generation, n).name for n in names} == {
        n: f"{generation}:{sides}" for n, sides in names.items()
    }


@pytest.mark.parametrize(
    ("generation", "chips", "message"),
    [("v5e", 512, "at most 256"), ("v5e", 12, "power of two"), ("x", 16, "got 'x'")],
)
def test_slice_of_rejects_numbers_of_chips_that_no_slice_has(generation, chips, message):
    with pytest.raises(TopologyError, match=message):
        slice_of(generation, chips)
