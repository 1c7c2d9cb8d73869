"""Abstract experiments: vocabularies, trip counts of decoding, and out-of-memory errors."""

import pytest
from micro import micro_config

from diladiff_jax import preflight
from diladiff_jax.data import tokenizers


def test_a_vocabulary_has_the_size_of_a_trained_tokenizer():
    """A small corpus yields fewer pieces than the setting allows, so padding may differ."""
    settings = micro_config().tokenizer
    text = [chr(first) + chr(second) for first in range(97, 123) for second in range(97, 123)] * 3
    trained = tokenizers.train(text, settings)
    found = preflight.Vocabulary.of(settings)
    assert found.vocab_size % 128 == 0
    assert found.vocab_size - trained.vocab_size in (0, 128, 256)
    assert found.sampleable.shape == (found.vocab_size,)
    assert not found.sampleable[found.mask_id] and found.sampleable[found.eot_id]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
            int(20.5 * 2**30),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (548.25G) exceeds available HBM (15.75G).",
            int(548.25 * 2**30),
        ),
        ("INVALID_ARGUMENT: no", None),
    ],
)
def test_the_needed_memory_is_read_from_the_compilers_error(message, expected):
    assert preflight.exhausted_bytes(message) == expected


def test_a_single_decoding_step_unmasks_everything():
    """256 rows at a time are 16 positions of each of 16 texts."""
    assert preflight.decoding_trips(16, 32, 1) == (1.0, 2.0)


def test_random_order_skips_steps_in_which_nothing_is_unmasked():
    steps, rounds = preflight.decoding_trips(32, 1024, 64)
    assert steps == 64.0 and 2.0 < rounds < 6.0
    steps, rounds = preflight.decoding_trips(1, 8, 10_000)
    assert 7.9 < steps <= 8.0 and rounds == 1.0


def test_decoding_by_count_unmasks_equally_many_per_step():
    """16 positions per example and step, 8 at a time."""
    assert preflight.decoding_trips(32, 1024, 64, "count") == (64.0, 2.0)


@pytest.mark.parametrize(("batch", "rounds"), [(1, 1.0), (2, 1.5)])
def test_decoding_by_confidence_processes_all_masked_positions(batch, rounds):
    assert preflight.decoding_trips(batch, 256, 2, "confidence") == (2.0, rounds)
