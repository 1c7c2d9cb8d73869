"""Latent samplers on Gaussian data: denoiser, flow and average velocity have closed forms."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from gaussian_data import (
    D1,
    D3,
    MEAN,
    STD,
    denoise,
    keys_for,
    ode,
)

from diladiff_jax.diffusion import gaussian
from diladiff_jax.sampling import latent


@pytest.mark.parametrize("method", ["euler", "ddim"])
@pytest.mark.parametrize("schedule", [D1, D3], ids=repr)
def test_ode_samplers_converge_at_first_order_to_the_flow(method, schedule):
    """Doubling the steps halves the distance to m + s z_1 (ratio 1.8 to 2.2).

    One compiled program serves every number of steps.
    """
    noise = jax.random.normal(jax.random.key(0), (64, 1, 2))
    run = ode(schedule, method)
    errors = [np.abs(run(noise, steps) - (MEAN + STD * noise)).max() for steps in (40, 80, 160)]
    assert errors[2] < 0.05
    for coarse, fine in itertools.pairwise(errors):
        assert 1.8 < coarse / fine < 2.2
    assert run._cache_size() == 1


def distance(schedule, method, steps):
    """Largest distance of the ODE's end to m + s z_1."""
    noise = jax.random.normal(jax.random.key(0), (64, 1, 2))
    return np.abs(ode(schedule, method)(noise, steps) - (MEAN + STD * noise)).max()


@pytest.mark.parametrize("schedule", [D1, D3], ids=repr)
def test_heun_converges_at_second_order_to_the_flow(schedule):
    """Doubling the steps divides the distance to m + s z_1 by 3.2 to 4.8.

    One compiled program serves every number of steps.
    """
    errors = [distance(schedule, "heun", steps) for steps in (20, 40, 80)]
    for coarse, fine in itertools.pairwise(errors):
        assert 3.2 < coarse / fine < 4.8
    assert ode(schedule, "heun")._cache_size() == 1


@pytest.mark.parametrize("schedule", [D1, D3], ids=repr)
def test_multistep_converges_faster_than_first_order(schedule):
    """Eight times the steps divide the distance by more than 12, where first order gives 8.

    On a grid that is equal in t, a logarithm is missing to second order. The distance is below a
    tenth of DDIM's at the same number of calls.
    """
    assert distance(schedule, "dpmpp_2m", 80) > 12 * distance(schedule, "dpmpp_2m", 640)
    assert 7.5 < distance(schedule, "ddim", 80) / distance(schedule, "ddim", 640) < 8.5
    assert 10 * distance(schedule, "dpmpp_2m", 640) < distance(schedule, "ddim", 640)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_multistep_is_exact_for_a_constant_prediction(steps):
    """As DDIM is: the line through two equal predictions is the constant."""
    noise, constant = jax.random.normal(jax.random.key(0), (3, 1, 2)), jnp.full((3, 1, 2), 1.7)
    end = latent.reverse_diffusion(
        lambda *a: constant, D3, noise, steps, keys=keys_for(noise), method="dpmpp_2m"
    )
    np.testing.assert_allclose(end, constant, atol=1e-5)


def from_step_to_step(method, schedule, eta, *, final_noise=0.0, steps=4, samples=20_000):
    """(time, state) of the sampler at every grid time, for a perfect denoiser."""
    noise, seen = jax.random.normal(jax.random.key(3), (samples, 1, 2)), []

    def predict(z_t, t, previous):
        seen.append((float(t[0]), np.asarray(z_t)))
        return denoise(schedule, z_t, t)

    with jax.disable_jit():
        end = latent.reverse_diffusion(
            predict,
            schedule,
            noise,
            steps,
            keys=keys_for(noise),
            method=method,
            eta=eta,
            final_noise=final_noise,
        )
    return noise, [*seen, (float(latent.end_time(schedule, final_noise)), np.asarray(end))]


def variance_after(schedule, t, s, variance, std, eta):
    """Variance of one coordinate of z_s, given that of z_t, for a perfect linear denoiser.

    From the mean and the variance of equation 16 of DDIM, with z = E[z | z_t].
    """
    alpha_t, sigma_t, alpha_s, sigma_s = (
        float(f(jnp.float32(x))) for x in (t, s) for f in (schedule.alpha, schedule.sigma)
    )
    fresh = eta * sigma_s * np.sqrt(1 - (sigma_s * alpha_t / (alpha_s * sigma_t)) ** 2)
    kept = np.sqrt(sigma_s**2 - fresh**2) / sigma_t
    gain = alpha_t * std**2 / (alpha_t**2 * std**2 + sigma_t**2)
    factor = (alpha_s - kept * alpha_t) * gain + kept
    return factor**2 * variance + fresh**2


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", [D1, D3], ids=repr)
def test_ddim_has_the_variance_that_its_equation_gives_at_every_time(schedule, eta):
    """On Gaussian data a chain of linear steps: the variance follows by recursion, for every eta.

    The mean is exact at every time. 20,000 samples, 5 sigma: false alarm 6e-7 each.
    """
    _, states = from_step_to_step("ddim", schedule, eta)
    variances = np.ones(2)
    for i, (t, z) in enumerate(states):
        if i:
            before = states[i - 1][0]
            variances = [
                variance_after(schedule, before, t, v, std, eta)
                for v, std in zip(variances, np.asarray(STD).ravel(), strict=True)
            ]
        alpha = float(schedule.alpha(jnp.float32(t)))
        flat = z.reshape(-1, 2)
        error = np.abs(flat.mean(axis=0) - alpha * np.asarray(MEAN).ravel())
        assert (error < 5 * np.sqrt(np.array(variances) / len(flat)) + 1e-6).all()
        np.testing.assert_allclose(flat.var(axis=0), variances, rtol=5 * np.sqrt(2 / len(flat)))


@pytest.mark.parametrize("method", ["ddim", "sde_dpmpp_2m"])
def test_stochastic_solvers_converge_to_the_data_and_forget_the_noise(method):
    """With 400 steps the end is N(m, s^2) (KS, 20,000 samples, false alarm 1e-4 each).

    With eta = 1 it hardly depends on the initial noise, which the ODE keeps.
    """
    noise = jax.random.normal(jax.random.key(3), (20_000, 1, 2))
    end = jax.jit(
        lambda noise: latent.reverse_diffusion(
            functools.partial(denoise, D1),
            D1,
            noise,
            400,
            keys=keys_for(noise),
            method=method,
            eta=1.0,
        )
    )(noise)
    standard = np.asarray((end - MEAN) / STD).reshape(-1, 2)
    for coordinate in standard.T:
        assert scipy.stats.kstest(coordinate, "norm").pvalue > 1e-4
    for i in range(2):
        assert abs(np.corrcoef(standard[:, i], np.asarray(noise)[:, 0, i])[0, 1]) < 0.06


def test_the_second_order_stochastic_solver_is_closer_at_few_steps():
    """Its variance at the end, after 12 steps, is nearer to the data's than the posterior's is."""
    errors = {}
    for method in ("ddim", "sde_dpmpp_2m"):
        _, states = from_step_to_step(method, D1, 1.0, steps=12)
        variance = states[-1][1].reshape(-1, 2).var(axis=0)
        errors[method] = np.abs(variance / np.asarray(STD).ravel() ** 2 - 1).max()
    assert errors["sde_dpmpp_2m"] < 0.7 * errors["ddim"]


@pytest.mark.parametrize("method", ["ddim", "dpmpp_2m", "sde_dpmpp_2m"])
def test_a_sampler_can_stop_at_a_noise_level(method):
    """It ends where sigma is `final_noise`: of a constant c, at alpha c with variance sigma^2."""
    noise, constant = jax.random.normal(jax.random.key(0), (4_000, 1, 2)), 1.7
    end = jax.jit(
        lambda noise: latent.reverse_diffusion(
            lambda z, t, c: jnp.full_like(z, constant),
            D3,
            noise,
            7,
            keys=keys_for(noise),
            method=method,
            eta=1.0,
            final_noise=0.6,
        )
    )(noise)
    flat = np.asarray(end).ravel()
    assert abs(flat.mean() - 0.8 * constant) < 5 * 0.6 / np.sqrt(flat.size)
    assert abs(flat.var() / 0.36 - 1) < 5 * np.sqrt(2 / flat.size)


def test_linear_variance_ddim_converges_too():
    """The rotation reads no velocity, so it does not matter that it is infinite at both ends."""
    schedule = gaussian.LinearVarianceSchedule()
    noise = jax.random.normal(jax.random.key(0), (64, 1, 2))
    errors = [
        np.abs(ode(schedule, "ddim")(noise, steps) - (MEAN + STD * noise)).max()
        for steps in (50, 400)
    ]
    assert errors[1] < 0.05 and errors[1] < errors[0] / 3


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_ddim_is_exact_for_a_constant_prediction(steps):
    """It ends on the constant; every state before is on the rotation from the noise to it."""
    noise, constant, seen = (
        jax.random.normal(jax.random.key(0), (3, 1, 2)),
        jnp.full((3, 1, 2), 1.7),
        [],
    )

    def predict(z_t, t, previous):
        seen.append((z_t, t))
        return constant

    with jax.disable_jit():
        end = latent.reverse_diffusion(
            predict, D3, noise, steps, keys=keys_for(noise), method="ddim"
        )
    np.testing.assert_allclose(end, constant, atol=1e-5)
    np.testing.assert_allclose([t[0] for _, t in seen], 1 - np.arange(steps) / steps, atol=1e-6)
    for z_t, t in seen:
        np.testing.assert_allclose(z_t, gaussian.diffuse(D3, constant, noise, t), atol=1e-5)


@pytest.mark.parametrize(("mode", "expected"), [("previous", 4), ("current", 2), ("none", 1)])
def test_the_denoiser_is_conditioned_as_asked(mode, expected):
    """A denoiser that adds one to its self-conditioning counts how it was called.

    Four steps give 4 with the previous prediction, 2 with the current one, and 1 with none.
    """
    noise = jnp.zeros((2, 1, 2))
    end = latent.reverse_diffusion(
        lambda z, t, c: c + 1,
        D1,
        noise,
        4,
        keys=keys_for(noise),
        method="ddim",
        self_conditioning=mode,
    )
    np.testing.assert_allclose(end, expected, atol=1e-5)


def test_unknown_names_are_rejected_with_the_valid_ones():
    """Solver, self-conditioning and warp."""
    z = jnp.zeros((1, 1, 2))
    with pytest.raises(ValueError, match="ddim"):
        latent.reverse_diffusion(lambda *a: z, D1, z, 1, keys=keys_for(z), method="rk9")
    with pytest.raises(ValueError, match="previous"):
        latent.reverse_diffusion(lambda *a: z, D1, z, 1, keys=keys_for(z), self_conditioning="all")
    with pytest.raises(ValueError, match="literal"):
        latent.few_step(
            lambda *a: z,
            lambda *a: z,
            D1,
            jax.random.split(jax.random.key(0), 1),
            (1, 2),
            1,
            warp="off",
        )
