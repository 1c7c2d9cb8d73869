"""The ODE's likelihood of Gaussians, whose denoiser and density are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diladiff_jax.diffusion import gaussian
from diladiff_jax.evaluation.measures import ode_likelihood, probability_flow
from diladiff_jax.evaluation.measures.probability_flow import Tolerance

SHAPE = (3, 2)
MEAN = np.random.default_rng(0).normal(size=SHAPE)
STD = np.exp(0.5 * np.random.default_rng(1).normal(size=SHAPE))
SCHEDULES = [gaussian.TangentSchedule(d) for d in (1.0, 3.0, 10.0)] + [
    gaussian.LinearVarianceSchedule()
]


def optimal(schedule):
    """E[z | z_t] = m + alpha s^2 (z_t - alpha m) / (alpha^2 s^2 + sigma^2) for z ~ N(m, s^2)."""
    mean, variance = jnp.asarray(MEAN, jnp.float32), jnp.asarray(STD**2, jnp.float32)

    def predict(z_t, t):
        alpha, sigma = schedule.alpha(t)[:, None, None], schedule.sigma(t)[:, None, None]
        return mean[None] + alpha * variance[None] / (alpha**2 * variance[None] + sigma**2) * (
            z_t - alpha * mean[None]
        )

    return predict


def points(schedule, t, n=6):
    """Samples at time t, and their exact log-densities: N(alpha m, alpha^2 s^2 + sigma^2)."""
    alpha, sigma = (float(f(jnp.float32(t))) for f in (schedule.alpha, schedule.sigma))
    std = np.sqrt(alpha**2 * STD**2 + sigma**2)
    z = alpha * MEAN + std * np.random.default_rng(2).normal(size=(n, *SHAPE))
    return jnp.asarray(z, jnp.float32), scipy.stats.norm.logpdf(z, alpha * MEAN, std).sum(
        axis=(1, 2)
    )


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize(
    ("t_min", "divergence"), [(0.0, "hutchinson"), (0.05, "hutchinson"), (0.05, "exact")]
)
def test_log_density_of_a_gaussian(schedule, t_min, divergence):
    """It is exact to the solver's tolerance; so is Hutchinson's estimate of a diagonal Jacobian."""
    z, exact = points(schedule, t_min)
    found = jax.jit(
        lambda z, keys: probability_flow.log_density(
            optimal(schedule),
            schedule,
            z,
            keys,
            t_min=t_min,
            tolerance=Tolerance(1e-5, 1e-6),
            divergence=divergence,
        )
    )(z, jax.random.split(jax.random.key(0), len(z)))
    np.testing.assert_allclose(found.log_p, exact, atol=4e-3)
    assert (found.steps < probability_flow.MAX_STEPS).all()


def test_the_end_of_the_trajectory_is_the_noise_it_came_from():
    """For a Gaussian the flow is affine: z_1 = (z_0 - m) / s."""
    schedule = gaussian.TangentSchedule(2.0)
    z, _ = points(schedule, 0.0)
    found = probability_flow.log_density(
        optimal(schedule),
        schedule,
        z,
        jax.random.split(jax.random.key(0), len(z)),
        tolerance=Tolerance(1e-5, 1e-6),
    )
    np.testing.assert_allclose(found.noise, (np.asarray(z) - MEAN) / STD, atol=2e-3)


def test_hutchinson_is_unbiased_where_it_is_not_exact():
    """With a full Jacobian, the mean over 400 Rademacher vectors is near the exact divergence's.

    It is within 5 standard errors: a false alarm is rarer than 1e-6.
    """
    schedule = gaussian.TangentSchedule(1.0)
    mix = jnp.asarray(np.random.default_rng(3).normal(size=(6, 6)) * 0.15, jnp.float32)

    def predict(z_t, t):
        flat = z_t.reshape(len(z_t), -1)
        return optimal(schedule)(z_t, t) + jnp.sin(t)[:, None, None] * jnp.tanh(flat @ mix).reshape(
            z_t.shape
        )

    z = jnp.repeat(points(schedule, 0.1, 1)[0], 400, axis=0)
    run = jax.jit(
        lambda z, keys: probability_flow.log_density(predict, schedule, z, keys, t_min=0.1).log_p
    )
    found = np.asarray(run(z, jax.random.split(jax.random.key(0), 400)))
    exact = probability_flow.log_density(
        predict,
        schedule,
        z[:1],
        jax.random.split(jax.random.key(0), 1),
        t_min=0.1,
        divergence="exact",
    ).log_p[0]
    assert found.std() > 0.01
    assert abs(found.mean() - exact) < 5 * found.std() / 20 + 1e-3


def test_a_sample_does_not_depend_on_its_batch():
    """Every sample has its own step sizes and its own key."""
    schedule = gaussian.TangentSchedule(1.0)
    z, _ = points(schedule, 0.1)
    keys = jax.random.split(jax.random.key(0), len(z))
    run = lambda rows: probability_flow.log_density(
        optimal(schedule), schedule, z[rows], keys[rows], t_min=0.1
    )
    many, alone = run(jnp.arange(6)), run(jnp.array([4]))
    np.testing.assert_allclose(many.log_p[4], alone.log_p[0], atol=1e-4)
    assert many.steps[4] == alone.steps[0]


class Vocabulary:
    sampleable, mask_id, eot_id = np.arange(5) < 4, 4, -1


@pytest.mark.parametrize("t_min", [0.1, 0.5])
def test_the_bound_of_independent_latents_and_tokens(t_min):
    """Latents are N(m, s^2), tokens uniform over 4 ids: the decoder costs log 4 per token.

    The prior's cost minus q's entropy averages to KL(q | p), which has a closed form.
    """
    schedule = gaussian.TangentSchedule(1.0)
    rng = np.random.default_rng(4)
    n, length = 64, 7
    tokens = rng.integers(0, 4, (n, length)).astype(np.int32)
    latents = (MEAN + STD * rng.normal(size=(n, *SHAPE))).astype(np.float32)
    model = ode_likelihood.LatentModel(
        optimal(schedule),
        lambda x_t, z: jnp.zeros((*x_t.shape, 5)),
        schedule,
        Vocabulary,
        Tolerance(1e-4, 1e-5),
    )
    found = ode_likelihood.likelihood_bound(
        model, latents, tokens, jax.random.key(0), t_min=t_min, draws=3, batch=40
    )
    assert found["decoder_nats"]["value"] == pytest.approx(np.log(4), rel=1e-5)
    alpha, sigma = (float(f(jnp.float32(t_min))) for f in (schedule.alpha, schedule.sigma))
    total = alpha**2 * STD**2 + sigma**2
    # E_x KL(N(alpha z, sigma^2) | N(alpha m, total)) is the information of z' about z.
    information = 0.5 * np.log(total / sigma**2).sum() / length
    gap = found["prior_nats"]["value"] - found["entropy_nats"]["value"]
    # -log p has a variance of 1/2 per coordinate, so 5 standard errors of the mean over 64 rows of
    # 6 coordinates are 5 sqrt(3 / 64) nats per row.
    assert abs(gap - information) < 5 * np.sqrt(3 / n) / length
    assert found["nats"]["value"] == pytest.approx(np.log(4) + gap, rel=1e-5)
    assert found["bound_ppl"]["value"] == pytest.approx(np.exp(found["nats"]["value"]), rel=1e-6)


def test_invalid_arguments_are_rejected():
    schedule = gaussian.TangentSchedule(1.0)
    z, keys = jnp.zeros((1, *SHAPE)), jax.random.split(jax.random.key(0), 1)
    with pytest.raises(ValueError, match="divergence: got 'none'"):
        probability_flow.log_density(optimal(schedule), schedule, z, keys, divergence="none")
    with pytest.raises(ValueError, match=r"t_min: got 1\.0"):
        probability_flow.log_density(optimal(schedule), schedule, z, keys, t_min=1.0)
    with pytest.raises(ValueError, match="define a vector field"):
        probability_flow.clean_prediction(lambda z, t, c: z, "previous")
    tokens = np.zeros((1, 3), np.int32)
    model = ode_likelihood.LatentModel(
        optimal(schedule), lambda x, z: z, schedule, Vocabulary, Tolerance()
    )
    with pytest.raises(ValueError, match=r"t_min: got 0\.0"):
        ode_likelihood.likelihood_bound(
            model, np.asarray(z), tokens, keys[0], t_min=0.0, draws=1, batch=1
        )
