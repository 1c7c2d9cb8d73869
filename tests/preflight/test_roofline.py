"""The roofline: each bound by itself is an amount over a rate, rings have their closed forms, and slices are checked."""

import pytest

from diladiff_jax.preflight import roofline
from diladiff_jax.preflight.hlo_costs import Collective, Cost
from diladiff_jax.preflight.roofline import CHIPS, HOP, Slice

POD = Slice("v5e", (16, 16))
PLACES = [(x, y) for y in range(16) for x in range(16)]
ROW, COLUMN = tuple(range(16)), tuple(range(0, 256, 16))
SIZE = 64 * 2**20


def seconds(kind, group, where=POD, places=PLACES, size=SIZE, **options):
    return roofline.collective_seconds(Collective(kind, size, group, **options), where, places)


def test_a_single_bound_is_an_amount_over_a_rate():
    """Of compute and of memory, on one device; the two of one instruction overlap, two instructions do not."""
    chip = CHIPS["v5e"]
    product, copy = Cost("p", times=3, flops=1e12, passes=1e12), Cost("c", times=2, bytes=1e9)
    found = roofline.estimate([product], POD, PLACES)
    assert found.seconds == pytest.approx(3e12 / chip.flops) and found.bound_by == "compute"
    found = roofline.estimate([copy], POD, PLACES)
    assert found.seconds == pytest.approx(2e9 / chip.bandwidth) and found.bound_by == "memory"
    both = roofline.estimate([product, copy], POD, PLACES)
    assert both.seconds == pytest.approx(3e12 / chip.flops + 2e9 / chip.bandwidth)
    one = roofline.estimate([Cost("b", times=1, flops=1e12, passes=1e12, bytes=1e9)], POD, PLACES)
    assert one.seconds == pytest.approx(max(1e12 / chip.flops, 1e9 / chip.bandwidth))


def test_an_exchange_hides_behind_work_or_adds_to_it():
    """Overlapped, it costs what exceeds the work; alone, all of it."""
    exchange = Collective("all-reduce", SIZE, ROW)
    alone = roofline.collective_seconds(exchange, POD, PLACES)
    work = Cost("w", times=1, passes=CHIPS["v5e"].flops * 2 * alone)
    hidden = Cost("h", times=1, collective=Collective("all-reduce", SIZE, ROW, overlapped=True))
    assert roofline.estimate([work, hidden], POD, PLACES).seconds == pytest.approx(2 * alone)
    assert roofline.estimate([hidden], POD, PLACES).seconds == pytest.approx(alone)
    added = roofline.estimate([work, Cost("a", times=1, collective=exchange)], POD, PLACES)
    assert added.seconds == pytest.approx(3 * alone) and added.exposed_seconds == pytest.approx(
        alone
    )


def test_rings_have_their_closed_form():
    """Gather and scatter move 15/16 of the array over two links, a sum twice that; over both axes 255/256 over four."""
    link = CHIPS["v5e"].link
    once = SIZE * 15 / 16 / (2 * link)
    assert seconds("all-gather", ROW) == pytest.approx(once + 8 * HOP)
    assert seconds("reduce-scatter", COLUMN) == pytest.approx(once + 8 * HOP)
    assert seconds("all-reduce", ROW) == pytest.approx(2 * (once + 8 * HOP))
    assert seconds("all-gather", tuple(range(256))) == pytest.approx(
        SIZE * 255 / 256 / (4 * link) + 16 * HOP
    )
    assert seconds("all-reduce", (5,)) == 0


def test_open_axes_and_scattered_groups_are_slower():
    """Half a row cannot go around; every second chip shares its links with the others; a set that is no box has one link."""
    link = CHIPS["v5e"].link
    assert seconds("all-gather", ROW[:8]) == pytest.approx(SIZE * 7 / 8 / link + 7 * HOP)
    assert seconds("all-gather", ROW[::2]) == pytest.approx(SIZE * 7 / 8 / (2 * link / 2) + 8 * HOP)
    assert seconds("all-gather", (0, 1, 16)) == pytest.approx(SIZE * 2 / 3 / link + 2 * HOP)
    small = Slice("v5e", (4, 4))
    places = [(x, y) for y in range(4) for x in range(4)]
    assert seconds("all-gather", (0, 1, 2, 3), small, places) == pytest.approx(
        SIZE * 3 / 4 / link + 3 * HOP
    )


def test_whole_cubes_close_and_parts_do_not():
    """In three dimensions from 4 x 4 x 4 on; in two along 16 chips."""
    assert all(Slice("v5p", (4, 4, 8)).closed(axis) for axis in range(3)) and not Slice(
        "v5p", (2, 2, 4)
    ).closed(2)
    assert Slice("v5e", (8, 16)).closed(1) and not Slice("v5e", (8, 16)).closed(0)


def test_neighbours_pass_an_array_in_its_time_over_a_link():
    """A shift around a closed ring, by one and by two; all-to-all by what crosses the middle."""
    link = CHIPS["v5e"].link
    for step in (1, 2):
        pairs = tuple((i, (i + step) % 16) for i in range(16))
        assert seconds("collective-permute", (), pairs=pairs) == pytest.approx(
            step * (SIZE / link + HOP)
        )
    assert seconds("all-to-all", ROW) == pytest.approx(SIZE * 16 / 8 / link + 8 * HOP)


def test_devices_of_one_chip_share_it():
    """tpu7x has two: each has half of the rates, and an exchange between the two crosses no link."""
    where, chip = Slice("tpu7x", (2, 2, 1)), CHIPS["tpu7x"]
    places = [(x, y, 0) for y in range(2) for x in range(2) for _ in range(2)]
    assert roofline.estimate(
        [Cost("p", times=1, passes=1e12)], where, places
    ).seconds == pytest.approx(2e12 / chip.flops)
    assert seconds("all-reduce", (0, 1), where, places) == 0
    assert seconds("all-gather", (0, 2), where, places) == pytest.approx(
        SIZE / 2 / (chip.link / 2) + HOP
    )


def test_topologies_are_read_and_refused_in_one_line():
    """The generation, the number of sides, the size."""
    assert (
        roofline.parse_topology("v5p:4x4x8") == Slice("v5p", (4, 4, 8))
        and roofline.parse_topology("v5p:4x4x8").chips == 128
    )
    for text, words in (
        ("v9:4x4", "one of v4, v5e"),
        ("v5e", "2 whole sides with an x between, as in v5e:4x4"),
        ("v5p:4x4", "3 whole sides"),
        ("v5e:4xx4", "2 whole sides"),
        ("v5e:4y4", "2 whole sides"),
        ("v5e:0x4", "2 whole sides"),
        ("v5e:32x32", "at most 256"),
    ):
        with pytest.raises(roofline.TopologyError, match=words):
            roofline.parse_topology(text)


def test_slices_grow_as_cubes_do():
    """The box of so many chips that is most like a cube."""
    assert [roofline.slice_of("v5e", n).name for n in (1, 16, 64, 128, 256)] == [
        "v5e:1x1",
        "v5e:4x4",
        "v5e:8x8",
        "v5e:8x16",
        "v5e:16x16",
    ]
    assert [roofline.slice_of("v5p", n).name for n in (16, 64, 256, 1024)] == [
        "v5p:2x2x4",
        "v5p:4x4x4",
        "v5p:4x8x8",
        "v5p:8x8x16",
    ]
    for generation, chips, words in (
        ("v5e", 512, "at most 256"),
        ("v5e", 12, "power of two"),
        ("x", 16, "unknown"),
    ):
        with pytest.raises(roofline.TopologyError, match=words):
            roofline.slice_of(generation, chips)
