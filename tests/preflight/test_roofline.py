"""The roofline of products, memory traffic and collectives, in closed forms."""

import pytest

from diladiff_jax.parallel import CHIPS
from diladiff_jax.preflight import roofline
from diladiff_jax.preflight.hlo import Collective, Cost
from diladiff_jax.preflight.roofline import HOP
from diladiff_jax.preflight.topology import Slice

POD = Slice("v5e", (16, 16))
PLACES = [(x, y) for y in range(16) for x in range(16)]
ROW, COLUMN = tuple(range(16)), tuple(range(0, 256, 16))
SIZE = 64 * 2**20


def seconds(kind, group, where=POD, places=PLACES, size=SIZE, **options):
    return roofline.collective_seconds(Collective(kind, size, group, **options), where, places)


def test_an_instruction_takes_the_longer_of_compute_and_memory_and_instructions_add_up():
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


def test_an_overlapped_collective_adds_what_exceeds_the_work_and_any_other_its_full_time():
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


def test_collectives_on_closed_axes_run_as_rings_in_both_directions():
    """A gather over 16 chips moves 15/16 of the array over two links, an all-reduce twice that;
    over both axes it moves 255/256 over four links."""
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
    """Half a row is an open axis, every second chip shares its links with the chips in between, and
    a group that is not a box has a single link."""
    link = CHIPS["v5e"].link
    assert seconds("all-gather", ROW[:8]) == pytest.approx(SIZE * 7 / 8 / link + 7 * HOP)
    assert seconds("all-gather", ROW[::2]) == pytest.approx(SIZE * 7 / 8 / (2 * link / 2) + 8 * HOP)
    assert seconds("all-gather", (0, 1, 16)) == pytest.approx(SIZE * 2 / 3 / link + 2 * HOP)
    small = Slice("v5e", (4, 4))
    places = [(x, y) for y in range(4) for x in range(4)]
    assert seconds("all-gather", (0, 1, 2, 3), small, places) == pytest.approx(
        SIZE * 3 / 4 / link + 3 * HOP
    )


def test_a_permutation_takes_its_distance_times_the_time_over_one_link():
    """The permutation is a shift around a closed ring."""
    link = CHIPS["v5e"].link
    for step in (1, 2):
        pairs = tuple((i, (i + step) % 16) for i in range(16))
        assert seconds("collective-permute", (), pairs=pairs) == pytest.approx(
            step * (SIZE / link + HOP)
        )


def test_all_to_all_takes_what_crosses_the_middle_of_the_axis():
    link = CHIPS["v5e"].link
    assert seconds("all-to-all", ROW) == pytest.approx(SIZE * 16 / 8 / link + 8 * HOP)


def test_two_devices_on_a_chip_share_its_rates_and_need_no_link():
    """A tpu7x chip has two devices."""
    where, chip = Slice("tpu7x", (2, 2, 1)), CHIPS["tpu7x"]
    places = [(x, y, 0) for y in range(2) for x in range(2) for _ in range(2)]
    assert roofline.estimate(
        [Cost("p", times=1, passes=1e12)], where, places
    ).seconds == pytest.approx(2e12 / chip.flops)
    assert seconds("all-reduce", (0, 1), where, places) == 0
    assert seconds("all-gather", (0, 2), where, places) == pytest.approx(
        SIZE / 2 / (chip.link / 2) + HOP
    )
