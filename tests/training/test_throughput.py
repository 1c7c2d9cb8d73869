"""The clock of the loop, on a clock of the test's own."""

import jax
import pytest

from diladiff_jax.training import throughput


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(throughput.time, "monotonic", lambda: now[0])
    return now


def test_rates_leave_out_compiling_and_what_is_paused(clock):
    """The first update starts the clock; pauses do not count; a lap starts anew; utilization is FLOPs over the time and all devices' peak."""
    watch = throughput.Throughput(tokens=4096, devices=8, flops=6e9, peak=1e9)
    assert watch.lap() == {}
    clock[0] += 30  # compiling
    watch.updated()
    assert watch.lap() == {}
    for _ in range(4):
        clock[0] += 0.5
        watch.updated()
    with watch.paused():
        clock[0] += 1000
    assert watch.lap() == pytest.approx(
        {"tokens_per_second_per_device": 2 * 4096 / 8, "model_flops_utilization": 2 * 6e9 / 8e9}
    )
    clock[0] += 4
    watch.updated()
    assert watch.lap()["tokens_per_second_per_device"] == pytest.approx(4096 / 4 / 8)
    unknown = throughput.Throughput(tokens=1, devices=1)
    unknown.updated()
    clock[0] += 1
    unknown.updated()
    assert unknown.lap() == {"tokens_per_second_per_device": 1}


def test_devices_are_known_by_the_names_that_jax_gives_them():
    """The longest fitting name counts; a CPU has no published rate."""
    assert (
        throughput.peak_flops("TPU v5 lite") == 197e12
        and throughput.peak_flops("TPU v5p") == throughput.peak_flops("TPU v5") == 459e12
    )
    assert throughput.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert (
        throughput.peak_flops(jax.devices("cpu")[0].device_kind) is throughput.local_peak() is None
    )
