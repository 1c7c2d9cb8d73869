"""Tiny frozen networks of the earlier stages, shared by the tests of the objectives."""

import jax
import jax.numpy as jnp
import pytest

from diladiff_jax.diffusion.gaussian import TangentSchedule
from diladiff_jax.objectives.base import Context
from diladiff_jax.objectives.diladiff import DiLaDiff, DiLaDiffOptions
from diladiff_jax.objectives.encoding import DenoiserFeatures, TextEncoder
from diladiff_jax.objectives.ladiff import LaDiff
from diladiff_jax.objectives.statistics import Moments

TOKENS = jax.random.randint(jax.random.key(0), (16, 8), 0, 10)


@pytest.fixture(scope="session")
def tokens():
    return TOKENS


@pytest.fixture(scope="session")
def text_encoder(networks):
    return TextEncoder(DenoiserFeatures(networks.denoiser), networks.encoder)


@pytest.fixture(scope="session")
def context(networks, text_encoder, random_parameters):
    """Parameters of features, encoder and teacher, and the statistics of TOKENS."""
    z = jnp.zeros((1, 4, 6))
    frozen = {
        "features": random_parameters(networks.denoiser, TOKENS, seed=1),
        "encoder": random_parameters(networks.encoder, jnp.zeros((1, 8, 32)), seed=2),
        "teacher": random_parameters(networks.teacher, z, jnp.zeros(1), z, seed=3),
    }

    @jax.jit
    def statistics(frozen):
        f = text_encoder.features(frozen["features"], TOKENS)
        features = Moments.zeros((32,)).update(f.reshape(-1, 32))
        z = networks.encoder.apply({"params": frozen["encoder"]}, features.standardize(f))
        return {"features": features, "latents": Moments.zeros((4, 6)).update(z)}

    return Context(frozen=frozen, statistics=statistics(frozen))


@pytest.fixture(scope="session")
def latents(text_encoder, context):
    """The standardized latents of TOKENS."""
    return jax.jit(text_encoder.__call__)(context.frozen, context.statistics, TOKENS)


@pytest.fixture(scope="session")
def ladiff(text_encoder, networks):
    return LaDiff(text_encoder, networks.teacher, TangentSchedule(3.0))


@pytest.fixture(scope="session")
def make_diladiff(text_encoder, networks):
    schedule = TangentSchedule(3.0)
    return lambda **options: DiLaDiff(
        text_encoder, networks.teacher, networks.student, schedule, DiLaDiffOptions(**options)
    )
