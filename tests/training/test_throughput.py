"""Throughput, on a fake clock."""

import pytest

from diladiff_jax.training import throughput


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(throughput.time, "monotonic", lambda: now[0])
    return now


def advance(clock, watch, seconds, updates=1):
    for _ in range(updates):
        clock[0] += seconds
        watch.updated()


def test_the_first_update_only_starts_the_clock(clock):
    watch = throughput.Throughput(tokens=1, devices=1)
    assert watch.lap() == {}
    advance(clock, watch, 30)
    assert watch.lap() == {}


def test_rates_are_per_device_and_exclude_compilation_and_pauses(clock):
    """Utilization is the model's FLOPs over the elapsed time and the peak of all devices."""
    watch = throughput.Throughput(tokens=4096, devices=8, flops=6e9, peak=1e9)
    advance(clock, watch, 30)  # compiles
    advance(clock, watch, 0.5, updates=4)
    with watch.paused():
        clock[0] += 1000
    assert watch.lap() == pytest.approx(
        {"tokens_per_second_per_device": 2 * 4096 / 8, "model_flops_utilization": 2 * 6e9 / 8e9}
    )


def test_every_lap_starts_at_the_end_of_the_previous_one(clock):
    watch = throughput.Throughput(tokens=4096, devices=8)
    advance(clock, watch, 0.5, updates=3)
    watch.lap()
    advance(clock, watch, 4)
    assert watch.lap() == pytest.approx({"tokens_per_second_per_device": 4096 / 4 / 8})


def test_a_cpu_has_no_published_peak():
    assert throughput.local_peak() is None
