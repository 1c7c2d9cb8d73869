"""Batches: their order, their position, and what happens when reads fail."""

import errno
import itertools
import json
import logging
import math

import numpy as np
import pytest

from diladiff_jax.data import Batches, DataError, pipeline


def source(n, length=3):
    """Row i is [i, i, i], so that a batch shows which rows it holds."""
    return np.repeat(np.arange(n, dtype=np.int32)[:, None], length, axis=1)


def taken(batches, count):
    return np.stack([next(batches) for _ in range(count)])


@pytest.mark.parametrize("n, batch_size", [(10, 4), (12, 4), (3, 8), (1, 2), (97, 16)])
def test_every_epoch_is_a_permutation_of_all_rows(n, batch_size):
    epochs, count = 4, math.ceil(4 * n / batch_size)
    with Batches(source(n), batch_size, seed=3) as batches:
        out = taken(batches, count)
    assert out.dtype == np.int32 and out.shape[1:] == (batch_size, 3)
    stream = out[..., 0].reshape(-1)[: epochs * n].reshape(epochs, n)
    np.testing.assert_array_equal(np.sort(stream, axis=1), np.tile(np.arange(n), (epochs, 1)))
    if n > 8:
        assert len({tuple(e) for e in stream}) == epochs, "epochs repeat an order"


def test_every_seed_gives_other_epochs():
    """Also neighbouring seeds, whose epochs must not be the same ones, shifted by one."""

    def epochs(seed):
        with Batches(source(64), 64, seed) as batches:
            return {tuple(b[:, 0]) for b in taken(batches, 6)}

    orders = [epochs(s) for s in (0, 1, 2, -1)]
    assert all(len(o) == 6 for o in orders)
    assert not any(a & b for a, b in itertools.combinations(orders, 2))
    assert epochs(1) == orders[1]


def test_orders_are_uncorrelated_with_the_rows_and_with_each_other():
    """n independent draws correlate with deviation 1/sqrt(n), and keep 2/n of their neighbours."""
    n, epochs = 1000, 12
    with Batches(source(n), n, seed=0) as batches:
        orders = taken(batches, epochs)[..., 0]
    correlations = np.corrcoef(np.concatenate([np.arange(n)[None], orders]))[
        np.triu_indices(epochs + 1, 1)
    ]
    assert np.abs(correlations).max() < 5 / np.sqrt(n)
    assert np.mean(np.abs(np.diff(orders, axis=1)) == 1) < 2 * 2 / n


def share(p, processes, batch=8):
    """The places of process p, if each process holds one contiguous run of them."""
    return range(p * batch // processes, (p + 1) * batch // processes)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("threads, prefetch", [(0, 0), (3, 5)])
def test_global_batches_do_not_depend_on_processes_threads_or_prefetch(
    processes, threads, prefetch
):
    rows, count = source(22), 9
    with Batches(rows, 8, seed=5, threads=1, prefetch=1) as batches:
        expected = taken(batches, count)
    shares = []
    for p in range(processes):
        with Batches(
            rows, 8, 5, share(p, processes), threads=threads, prefetch=prefetch
        ) as batches:
            shares.append(taken(batches, count))
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), expected)


def test_a_process_reads_only_its_own_rows():
    class Recording:
        def __init__(self):
            self.read = []

        def __len__(self):
            return 40

        def __getitems__(self, indices):
            self.read += indices
            return [np.full(3, i, np.int32) for i in indices]

    rows = Recording()
    with Batches(rows, 8, 0, [2, 7], threads=0) as batches:
        out = taken(batches, 5)[..., 0].reshape(-1)
    assert rows.read == out.tolist() and len(out) == 10
    with Batches(Recording(), 8, 0) as batches:
        np.testing.assert_array_equal(out, taken(batches, 5)[:, [2, 7], 0].reshape(-1))


@pytest.mark.parametrize("before, after", [(4, 1), (1, 2), (2, 4), (4, 4)])
def test_resuming_continues_exactly_under_any_process_count(before, after):
    rows, count = source(30), 14
    with Batches(rows, 8, seed=1) as batches:
        expected = taken(batches, count)
    for stop in np.random.default_rng(0).choice(count, 5, replace=False):
        with Batches(rows, 8, 1, share(before - 1, before)) as batches:
            taken(batches, stop) if stop else None
            state = json.loads(json.dumps(batches.get_state()))
        assert state["position"] == stop and all(isinstance(v, int) for v in state.values())
        shares = []
        for p in range(after):
            with Batches(rows, 8, 1, share(p, after), threads=3) as batches:
                next(batches)  # another position, with reads in flight
                batches.set_state(state)
                assert batches.get_state() == state
                shares.append(taken(batches, count - stop))
        np.testing.assert_array_equal(np.concatenate(shares, axis=1), expected[stop:])


def test_unshuffled_batches_keep_the_order_of_the_rows_and_fixed_ones_are_the_first():
    rows = source(10)
    with Batches(rows, 4, 0, shuffle=False) as batches:
        np.testing.assert_array_equal(taken(batches, 5)[..., 0].reshape(-1), np.arange(20) % 10)
    for count, complete in ((0, 2), (9, 2), (7, 1), (100, 2)):
        shares = [Batches.fixed(rows, 4, count, share(p, 2, 4)) for p in range(2)]
        assert len(shares[0]) == complete
        for _ in range(2):  # it may be iterated over again
            both = np.concatenate([np.stack(list(s)) for s in shares], axis=1)
            np.testing.assert_array_equal(both[..., 0].reshape(-1), np.arange(4 * complete))


def test_bad_input_is_rejected_in_one_line():
    rows = source(10)
    with Batches(rows, 4, 0) as batches:
        state = batches.get_state()
        attempts = [
            lambda: batches.set_state(state | {"seed": 1}),
            lambda: batches.set_state(state | {"rows": 11}),
            lambda: batches.set_state({}),
            lambda: batches.set_state(state | {"position": -1}),
            lambda: Batches(rows, 0, 0),
            lambda: Batches(rows, 4, 0, [2, 4]),
            lambda: Batches(rows, 4, 0, []),
            lambda: Batches(rows[:0], 4, 0),
            lambda: Batches.fixed(rows, 16),
        ]
        for attempt in attempts:
            with pytest.raises(DataError) as error:
                attempt()
            assert "\n" not in str(error.value)
        next(batches)  # still usable
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


class Faulty:
    """The rows of `source`; the reads in `failing`, counted from 0, raise `error`."""

    def __init__(self, n, failing, error=None):
        self.rows, self.failing, self.error, self.reads = (
            source(n),
            failing,
            error or OSError(errno.EIO, "Input/output error"),
            itertools.count(),
        )

    def __len__(self):
        return len(self.rows)

    def __getitems__(self, indices):
        if next(self.reads) in self.failing:
            raise self.error
        return list(self.rows[indices])


@pytest.fixture
def pauses(monkeypatch):
    """Records the pauses between reads instead of waiting."""
    made = []
    monkeypatch.setattr(pipeline.time, "sleep", made.append)
    return made


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("failing", [{0}, {2, 4, 5, 6, 12, 17}], ids=["first", "others"])
def test_a_read_that_fails_temporarily_changes_no_batch(threads, failing, pauses, caplog):
    with Batches(source(30), 8, seed=1) as batches:
        expected = taken(batches, 20)
    with (
        Batches(Faulty(30, failing), 8, 1, threads=threads) as batches,
        caplog.at_level(logging.WARNING),
    ):
        np.testing.assert_array_equal(taken(batches, 20), expected)
        assert batches.get_state()["position"] == 20
    assert (
        0 < len(caplog.records) == len(pauses) <= len(failing)
        and "Input/output error; retrying in 0.2 s" in caplog.text
    )


@pytest.mark.parametrize("threads", [0, 2])
def test_a_read_that_keeps_failing_is_one_line_and_its_batch_comes_next(threads, pauses, caplog):
    with Batches(source(30), 8, seed=1) as batches:
        expected = taken(batches, 12)
    rows = Faulty(30, ())
    with Batches(rows, 8, 1, threads=threads, prefetch=3) as batches:
        first = taken(batches, 5)
        rows.failing = range(10**9)
        with pytest.raises(
            DataError, match="Input/output error; 5 reads within 12 s failed"
        ) as error:
            taken(batches, 7)
        assert (
            "\n" not in str(error.value)
            and pauses == list(pipeline._PAUSES)
            and len(caplog.records) == len(pauses)
        )
        position = batches.get_state()["position"]
        assert 5 <= position <= 5 + 3 * bool(threads)  # prefetched batches come first
        rows.failing = ()
        np.testing.assert_array_equal(taken(batches, 12 - position), expected[position:])
    np.testing.assert_array_equal(first, expected[:5])


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize(
    "error", [ZeroDivisionError("a bug"), SystemExit(3)], ids=["Exception", "SystemExit"]
)
def test_any_other_error_in_a_reading_thread_is_raised_unchanged_and_nothing_hangs(
    threads, error, pauses
):
    """A caller that catches it gets the same batch next."""
    with Batches(source(30), 8, seed=1) as batches:
        expected = taken(batches, 4)
    found, raised = [], 0
    with Batches(Faulty(30, {2}, error), 8, 1, threads=threads) as batches:
        while len(found) < 4:
            try:
                found.append(next(batches))
            except type(error):
                raised += 1
    np.testing.assert_array_equal(np.stack(found), expected)
    assert raised == 1 and not pauses


def test_reads_of_validation_batches_are_retried_too(pauses):
    fixed = Batches.fixed(Faulty(10, {1}), 4)
    np.testing.assert_array_equal(np.stack(list(fixed))[..., 0], np.arange(8).reshape(2, 4))
    assert pauses == [0.2]
    with pytest.raises(DataError, match="Input/output error"):
        Batches.fixed(Faulty(10, range(99)), 4)[0]
