"""Bounds of settings hold for the number that a device computes with."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diladiff_jax.diffusion.schedules import ScheduleOptions
from diladiff_jax.options import OptionError, in_float32
from diladiff_jax.run_options import TrainingOptions
from diladiff_jax.sampling.categorical import MAX_TEMPERATURE, token_distribution
from diladiff_jax.sampling.options import SamplingOptions


@pytest.mark.parametrize("temperature", [1e7, 1e38, 1e39, math.inf, math.nan, -1e-3])
def test_a_temperature_that_gives_no_text_is_rejected(temperature):
    with pytest.raises(OptionError, match="^temperature: got .*, expected between 0 and 1000000"):
        SamplingOptions(temperature=temperature)


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-6, 1.0, MAX_TEMPERATURE, 1e38, 3e38])
def test_every_temperature_gives_text(temperature):
    """Also where the pure function is called without a check: no NaN, and no id of no text."""
    logits = jnp.asarray([[1.0, 0.0, -3.0, -jnp.inf]])
    p = np.asarray(jax.jit(token_distribution)(logits, jnp.float32(temperature), 1.0))
    assert np.isfinite(p).all() and p[0, 3] == 0 and p.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        (TrainingOptions, "ema", 1 - 1e-12),
        (TrainingOptions, "b2", 1 - 1e-12),
        (TrainingOptions, "learning_rate", 1e-300),
        (TrainingOptions, "learning_rate", 1e300),
        (TrainingOptions, "epsilon", 1e-40),
        (ScheduleOptions, "d", 1e-300),
        (SamplingOptions, "gamma", 1 - 1e-12),
    ],
)
def test_a_number_that_float32_rounds_out_of_range_is_rejected(options, name, value):
    """It would pass in float64 and be 1, 0 or infinite where it is used."""
    with pytest.raises(OptionError, match=f"^{name}: got "):
        options(**{name: value})


def test_numbers_are_those_of_the_device():
    for value in (0.1, 1.0, 1e-38 * 2, 3e38):
        assert in_float32(value) == float(np.float32(value))
    assert in_float32(1e-39) == 0 == in_float32(-1e-39)
    assert in_float32(1e39) == math.inf
