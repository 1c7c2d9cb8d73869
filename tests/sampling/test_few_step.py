"""The student's sampler on Gaussian data, where the exact average velocity is known."""

import functools

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
    average_velocity,
    denoise,
    noisy_std,
    ode,
)

from diladiff_jax.diffusion import gaussian, meanflow
from diladiff_jax.sampling import latent
from diladiff_jax.sampling.categorical import normal_per_sample


def start_of(keys, shape=(1, 2)):
    """The sampler's own initial noise."""
    return normal_per_sample(jax.vmap(lambda k: jax.random.split(k)[0])(keys), shape)


def few(schedule, keys, steps, **kw):
    u, clean = functools.partial(average_velocity, schedule), functools.partial(denoise, schedule)
    return latent.few_step(u, clean, schedule, keys, (1, 2), steps, **kw)


@pytest.mark.parametrize("schedule", [D1, D3, gaussian.LinearVarianceSchedule()], ids=repr)
@pytest.mark.parametrize("warp", ["noise_level", "literal"])
def test_without_noise_the_jumps_are_the_flow(schedule, warp):
    """With gamma = 0 and the exact average velocity, any number of steps ends on m + s z_1."""
    keys = jax.random.split(jax.random.key(0), 50)
    run = jax.jit(lambda keys, steps: few(schedule, keys, steps, gamma=0.0, warp=warp))
    for steps in (1, 2, 5):
        np.testing.assert_allclose(run(keys, steps), MEAN + STD * start_of(keys), atol=2e-5)


def test_the_student_can_stop_at_a_noise_level():
    """The exact student's jumps end on the flow at the time where sigma is `final_noise`."""
    keys, t = jax.random.split(jax.random.key(0), 50), latent.end_time(D3, 0.6)
    expected = 0.8 * MEAN + noisy_std(D3, t[None]) * start_of(keys)
    for steps in (1, 3):
        found = few(D3, keys, steps, gamma=0.0, final_noise=0.6)
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("warp", ["noise_level", "literal"])
def test_no_noise_is_added_after_the_last_jump(warp):
    """One step with gamma = 0.8 equals one step without."""
    keys = jax.random.split(jax.random.key(0), 50)
    np.testing.assert_allclose(
        few(D3, keys, 1, gamma=0.8, warp=warp), MEAN + STD * start_of(keys), atol=1e-5
    )


def trajectory(schedule, keys, steps, **kw):
    """(time, state) at every grid time, and at 0 the result."""
    seen = []

    def clean(z_t, t, self_condition):
        seen.append((float(t[0]), np.asarray(z_t)))
        return denoise(schedule, z_t, t)

    with jax.disable_jit():
        end = latent.few_step(
            functools.partial(average_velocity, schedule),
            clean,
            schedule,
            keys,
            (1, 2),
            steps,
            **kw,
        )
    return [*seen, (0.0, np.asarray(end))]


@pytest.mark.parametrize("schedule", [D1, D3], ids=repr)
def test_noise_level_keeps_the_exact_marginal_at_every_grid_time(schedule):
    """With the exact average velocity each state is N(alpha m, alpha^2 s^2 + sigma^2).

    KS test of 20,000 samples, false alarm 1e-5 each. The literal form fails it.
    """
    keys = jax.random.split(jax.random.key(1), 20_000)

    def p_values(warp):
        for t, z in trajectory(schedule, keys, 4, gamma=0.8, warp=warp):
            t = jnp.array([t])
            standard = (z - schedule.alpha(t).reshape(1, 1, 1) * MEAN) / noisy_std(schedule, t)
            for coordinate in np.asarray(standard).reshape(-1, 2).T:
                yield scipy.stats.kstest(coordinate, "norm").pvalue

    assert min(p_values("noise_level")) > 1e-5
    assert min(p_values("literal")) < 1e-12


def test_gamma_is_the_share_of_fresh_noise():
    """gamma near 1 forgets the initial noise, gamma = 0 keeps it."""
    keys = jax.random.split(jax.random.key(2), 4_000)
    correlation = lambda gamma: np.corrcoef(
        start_of(keys)[:, 0, 0], few(D1, keys, 6, gamma=gamma)[:, 0, 0]
    )[0, 1]
    assert correlation(0.0) > 0.999
    assert abs(correlation(0.999)) < 0.2 < correlation(0.5) < 0.95


@pytest.mark.parametrize("warp", ["noise_level", "literal"])
def test_the_update_is_the_stated_formula(warp):
    """A non-linear u, step by step in numpy: warped time, scale and gamma sigma_s eps."""
    gamma, steps, schedule = 0.8, 3, D3
    keys = jax.random.split(jax.random.key(3), 5)
    u = lambda z, t, r, c: jnp.tanh(z) * (t + r * r).reshape(-1, 1, 1) + 0.1 * c
    clean = lambda z, t, c: jnp.sin(z)
    ours = jax.jit(
        lambda keys: latent.few_step(
            u, clean, schedule, keys, (1, 2), steps, gamma=gamma, warp=warp
        )
    )(keys)
    angle = lambda t: np.arctan(3 * np.tan(np.pi * t / 2))
    z = np.asarray(start_of(keys), np.float64)
    noise_keys = jax.vmap(lambda k: jax.random.split(k)[1])(keys)
    for k in range(steps):
        t, s = 1 - k / steps, 1 - (k + 1) / steps
        if warp == "literal":
            r, scale = 0.6 * s, 1.0
        else:
            r = 2 / np.pi * np.arctan(0.6 * np.tan(angle(s)) / 3)
            scale = np.cos(angle(s)) / np.cos(angle(r))
        z = z - (t - r) * (np.tanh(z) * (t + r * r) + 0.1 * np.sin(z))
        if k + 1 < steps:
            eps = np.stack(
                [jax.random.normal(jax.random.fold_in(key, k), (1, 2)) for key in noise_keys]
            )
            z = scale * z + gamma * np.sin(angle(s)) * eps
    np.testing.assert_allclose(ours, z, rtol=1e-4, atol=1e-5)


def test_self_conditioning_of_the_student_can_be_left_out():
    """Without a clean prediction every jump is conditioned on zeros, at one call less."""
    keys, seen = jax.random.split(jax.random.key(6), 3), []

    def u(z, t, r, condition):
        seen.append(condition)
        return jnp.tanh(z) + condition

    zeros = lambda z_t, t, condition: jnp.zeros_like(z_t)
    without, with_zeros = (
        latent.few_step(u, clean, D1, keys, (1, 2), 3, gamma=0.5) for clean in (None, zeros)
    )
    np.testing.assert_array_equal(without, with_zeros)
    assert len(seen) == 2 and without.shape == (3, 1, 2)


def test_each_latent_depends_on_its_own_key_alone():
    """The same keys in another batch give the same noise and the same samples."""
    keys = jax.random.split(jax.random.key(4), 16)
    run = jax.jit(lambda keys: few(D1, keys, 5))
    np.testing.assert_array_equal(
        normal_per_sample(keys, (3, 2))[5:6], normal_per_sample(keys[5:6], (3, 2))
    )
    np.testing.assert_allclose(run(keys)[5:8], run(keys[5:8]), rtol=1e-5, atol=1e-6)
    assert np.unique(run(keys)).size == 32


@pytest.mark.parametrize(("form", "method"), [("rotation", "ddim"), ("velocity", "euler")])
def test_each_step_form_of_a_perfect_student_is_a_solver_of_the_prior(form, method):
    """With gamma = 0, T student steps are T solver steps of the same denoiser."""
    keys = jax.random.split(jax.random.key(5), 20)
    u = lambda z, t, r, c: meanflow.STEP_FORMS[form](D3, z, denoise(D3, z, t), t, r)
    student = jax.jit(
        lambda keys: latent.few_step(u, lambda *a: a[0], D3, keys, (1, 2), 5, gamma=0.0)
    )(keys)
    expected = ode(D3, method)(start_of(keys), 5)
    np.testing.assert_allclose(student, expected, rtol=1e-3, atol=1e-4)
