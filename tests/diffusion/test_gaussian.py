"""Schedules, conversions and steps of the latent diffusion against closed forms.

They run in float64, except where the claim is about float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diladiff_jax.diffusion import gaussian
from diladiff_jax.options import OptionError

TANGENTS = [gaussian.TangentSchedule(d) for d in (0.5, 1.0, 10.0, 100.0)]
EMPIRICAL = [
    gaussian.EmpiricalSchedule(k, t0) for k, t0 in ((0.01, 0.5), (4.0, 0.5), (5.5, 0.3), (4.9, 0.8))
]
SCHEDULES = [*TANGENTS, gaussian.LinearVarianceSchedule(), *EMPIRICAL]
INTERIOR = np.linspace(0.01, 0.99, 33)

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
each_tangent = pytest.mark.parametrize("schedule", TANGENTS, ids=repr)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def batch(seed=0):
    rng = np.random.default_rng(seed)
    z, noise = rng.normal(size=(2, 33, 2, 3))
    return jnp.asarray(z), jnp.asarray(noise), jnp.asarray(INTERIOR)


@each_tangent
def test_tangent_schedule_is_arctan_of_d_tan(schedule, x64):
    """theta = arctan(d tan(pi t / 2)); alpha and sigma are its cosine and sine.

    logSNR = -2 log(d tan(pi t / 2)).
    """
    tangent = schedule.d * np.tan(np.pi * INTERIOR / 2)
    np.testing.assert_allclose(schedule.angle(INTERIOR), np.arctan(tangent), rtol=1e-12)
    np.testing.assert_allclose(schedule.alpha(INTERIOR), 1 / np.sqrt(1 + tangent**2), rtol=1e-12)
    np.testing.assert_allclose(
        schedule.sigma(INTERIOR), tangent / np.sqrt(1 + tangent**2), rtol=1e-12
    )
    np.testing.assert_allclose(
        gaussian.log_snr(schedule, INTERIOR), -2 * np.log(tangent), atol=1e-10
    )


def test_figure_6_of_the_paper():
    """alpha(0.2) = 0.294 at d = 10; d = 1 makes the angle linear in t."""
    assert abs(gaussian.TangentSchedule(10.0).alpha(0.2) - 0.294) < 5e-4
    np.testing.assert_allclose(
        gaussian.TangentSchedule(1.0).angle(INTERIOR), np.pi / 2 * INTERIOR, rtol=1e-6
    )


def test_linear_variance(x64):
    """sigma^2 = t, alpha^2 = 1 - t."""
    schedule = gaussian.make_schedule(gaussian.ScheduleOptions("linear_variance"))
    np.testing.assert_allclose(schedule.sigma(INTERIOR) ** 2, INTERIOR)
    np.testing.assert_allclose(schedule.alpha(INTERIOR) ** 2, 1 - INTERIOR)


@each_schedule
def test_derivatives_are_those_of_autodiff(schedule, x64):
    """theta' = d theta / dt, alpha' = -sigma theta', sigma' = alpha theta'."""
    rate = schedule.angle_rate(INTERIOR)
    derivative = lambda f: jax.vmap(jax.grad(f))(jnp.asarray(INTERIOR))
    np.testing.assert_allclose(rate, derivative(schedule.angle), rtol=1e-9)
    np.testing.assert_allclose(
        -schedule.sigma(INTERIOR) * rate, derivative(schedule.alpha), rtol=1e-9
    )
    np.testing.assert_allclose(
        schedule.alpha(INTERIOR) * rate, derivative(schedule.sigma), rtol=1e-9
    )


@each_schedule
def test_unit_circle_and_inverse_angle(schedule, x64):
    """alpha^2 + sigma^2 = 1 and (alpha, sigma) = (cos, sin)(theta).

    `time_of_angle` inverts `angle` on all of [0, 1].
    """
    t = np.linspace(0, 1, 65)
    theta = schedule.angle(t)
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1, rtol=1e-12)
    np.testing.assert_allclose(np.cos(theta), schedule.alpha(t), atol=1e-12)
    np.testing.assert_allclose(np.sin(theta), schedule.sigma(t), atol=1e-12)
    np.testing.assert_allclose(schedule.time_of_angle(theta), t, atol=1e-12)


@each_tangent
def test_ends_are_exact_and_finite_in_float32_and_under_grad(schedule):
    """(alpha, sigma) is exactly (1, 0) and (0, 1) at the ends, where log SNR is +-inf.

    Every derivative is finite there.
    """
    ends = jnp.array([0.0, 1.0], jnp.float32)
    np.testing.assert_array_equal(schedule.alpha(ends), [1, 0])
    np.testing.assert_array_equal(schedule.sigma(ends), [0, 1])
    np.testing.assert_array_equal(gaussian.log_snr(schedule, ends), [np.inf, -np.inf])
    for f in (schedule.alpha, schedule.sigma, schedule.angle, schedule.angle_rate):
        assert f(ends).dtype == jnp.float32
        assert np.isfinite(f(ends)).all() and np.isfinite(jax.vmap(jax.grad(f))(ends)).all()
    d = schedule.d
    np.testing.assert_allclose(
        schedule.angle_rate(ends), [np.pi * d / 2, np.pi / (2 * d)], rtol=1e-6
    )


@each_schedule
def test_velocity_is_the_time_derivative_of_the_path(schedule, x64):
    """v = d z_t / dt at fixed (z, eps), by forward differentiation of `diffuse`.

    The form with the implied noise agrees.
    """
    z, noise, t = batch()
    z_t, v = jax.jvp(lambda t: gaussian.diffuse(schedule, z, noise, t), (t,), (jnp.ones_like(t),))
    np.testing.assert_allclose(gaussian.velocity_of_noise(schedule, z, noise, t), v, rtol=1e-9)
    np.testing.assert_allclose(
        gaussian.velocity_of_clean(schedule, z_t, z, t), v, rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(
        gaussian.noise_of_clean(schedule, z_t, z, t), noise, rtol=1e-9, atol=1e-9
    )


@each_schedule
def test_phi_is_the_formula_and_the_inverse_of_the_velocity(schedule, x64):
    """Phi = (sigma v - sigma' z_t) / (sigma alpha' - sigma' alpha).

    Phi(velocity(z)) = z, and velocity(Phi(v)) = v.
    """
    z_t, v, t = batch(1)
    grad = lambda f: jax.vmap(jax.grad(f))(t)[:, None, None]
    alpha, sigma = schedule.alpha(t)[:, None, None], schedule.sigma(t)[:, None, None]
    d_alpha, d_sigma = grad(schedule.alpha), grad(schedule.sigma)
    clean = gaussian.clean_of_velocity(schedule, z_t, v, t)
    np.testing.assert_allclose(
        clean,
        (sigma * v - d_sigma * z_t) / (sigma * d_alpha - d_sigma * alpha),
        rtol=1e-8,
        atol=1e-8,
    )
    np.testing.assert_allclose(
        gaussian.velocity_of_clean(schedule, z_t, clean, t), v, rtol=1e-8, atol=1e-8
    )


@each_schedule
def test_ddim_is_exact_for_a_constant_prediction(schedule, x64):
    """With the true z, the rotation lands on the same path at every s < t, including s = 0.

    Two steps equal one.
    """
    z, noise, t = batch(2)
    z_t = gaussian.diffuse(schedule, z, noise, t)
    for share in (0.0, 0.3, 0.9):
        s = share * t
        z_s = gaussian.ddim_step(schedule, z_t, z, t, s)
        np.testing.assert_allclose(
            z_s, gaussian.diffuse(schedule, z, noise, s), rtol=1e-9, atol=1e-9
        )
        np.testing.assert_allclose(
            gaussian.ddim_step(schedule, z_s, z, s, 0.2 * s) if share else z_s,
            gaussian.ddim_step(schedule, z_t, z, t, 0.2 * s),
            rtol=1e-7,
            atol=1e-7,
        )


def test_ddim_stays_accurate_near_clean_in_float32():
    """Steps between times of 1e-6 keep float32's precision: no small number is a divisor."""
    schedule = gaussian.TangentSchedule(10.0)
    t, s = jnp.full(1, 2e-6), jnp.full(1, 1e-6)
    z, noise = jnp.full((1, 1, 1), 0.7), jnp.full((1, 1, 1), -1.3)
    z_s = gaussian.ddim_step(schedule, gaussian.diffuse(schedule, z, noise, t), z, t, s)
    np.testing.assert_allclose(z_s, gaussian.diffuse(schedule, z, noise, s), rtol=1e-6)


@each_schedule
def test_euler_step_has_the_second_order_local_error(schedule, x64):
    """Halving t - s quarters Euler's error against the true path (ratio between 3.6 and 4.4)."""
    z, noise, _ = batch(3)
    t = jnp.full(33, 0.6)
    z_t = gaussian.diffuse(schedule, z, noise, t)
    error = lambda h: np.abs(
        gaussian.euler_step(schedule, z_t, z, t, t - h)
        - gaussian.diffuse(schedule, z, noise, t - h)
    ).max()
    assert 3.6 < error(4e-4) / error(2e-4) < 4.4


@each_schedule
def test_jit_and_vmap_agree_with_plain_calls(schedule):
    """Every conversion of a batch equals its vmap over examples with scalar times, under jit."""
    z, noise, t = (jnp.asarray(x, jnp.float32) for x in batch(4))
    s = 0.5 * t
    for f in (
        gaussian.diffuse,
        gaussian.velocity_of_noise,
        gaussian.velocity_of_clean,
        gaussian.noise_of_clean,
        gaussian.clean_of_velocity,
    ):
        each = jax.jit(jax.vmap(functools.partial(f, schedule)))
        np.testing.assert_allclose(
            each(z, noise, t), f(schedule, z, noise, t), rtol=2e-4, atol=1e-5
        )
    each = jax.jit(jax.vmap(lambda a, b, t, s: gaussian.ddim_step(schedule, a, b, t, s)))
    np.testing.assert_allclose(
        each(z, noise, t, s), gaussian.ddim_step(schedule, z, noise, t, s), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", gaussian.SCHEDULES)
def test_each_schedule_knows_whether_its_velocity_is_finite(name):
    """`finite_velocity` is true exactly where the angle's rate is that of `angle` at both ends."""
    schedule = gaussian.make_schedule(gaussian.ScheduleOptions(name))
    rates = jax.vmap(jax.grad(schedule.angle))(jnp.array([0.0, 1.0]))
    assert schedule.finite_velocity == bool(np.isfinite(rates).all())


def test_options_that_no_schedule_can_have_are_rejected():
    """The message names the setting, its value, and what would be valid."""
    for options, message in (
        (dict(schedule="cosine"), "schedule: got 'cosine', expected one of tangent, linear_var"),
        (dict(d=0.0), "d: got 0.0, expected a number above 0"),
        (dict(t0=1.0), "t0: got 1.0, expected in \\(0, 1\\)"),
        (dict(k=9.0), "k: got 9.0, expected in \\(0, 8\\] at t0 = 0.5"),
    ):
        with pytest.raises(OptionError, match=message):
            gaussian.ScheduleOptions(**options)


@pytest.mark.parametrize("schedule", EMPIRICAL, ids=repr)
def test_the_decoding_error_grows_linearly_under_its_own_schedule(schedule, x64):
    """omega(2 theta(t) / pi) = (1 - t) omega(0) + t omega(1), for any w0 and w1."""
    t = np.linspace(0, 1, 41)
    omega = lambda u: 0.1 + 0.4 * (1 + np.tanh(schedule.k * (u - schedule.t0)))
    u = np.asarray(schedule.angle(jnp.asarray(t))) * 2 / np.pi
    np.testing.assert_allclose(omega(u), (1 - t) * omega(0.0) + t * omega(1.0), rtol=1e-10)
    assert (np.diff(u) > 0).all() and u[0] == 0 and u[-1] == 1


@pytest.mark.parametrize("schedule", [*EMPIRICAL, gaussian.EmpiricalSchedule(7.9, 0.5)], ids=repr)
def test_empirical_ends_are_exact_in_float32(schedule):
    """alpha(1) = 0 = sigma(0) exactly, and `time_of_angle` inverts `angle`.

    At both ends, rates are finite and derivatives are not NaN.
    """
    ends = jnp.array([0.0, 1.0])
    np.testing.assert_array_equal(schedule.sigma(ends), [0, 1])
    np.testing.assert_array_equal(schedule.alpha(ends), [1, 0])
    derivative = jax.vmap(jax.grad(schedule.angle))(ends)
    np.testing.assert_allclose(schedule.angle_rate(ends), derivative, rtol=1e-4)
    t = jnp.linspace(0, 1, 33)
    np.testing.assert_allclose(schedule.time_of_angle(schedule.angle(t)), t, atol=2e-5)


def test_a_flat_error_leaves_time_alone():
    """As k -> 0, theta becomes linear in t. Values that float32 cannot represent are rejected."""
    np.testing.assert_allclose(
        gaussian.EmpiricalSchedule(0.01, 0.5).angle(INTERIOR), np.pi / 2 * INTERIOR, atol=1e-4
    )
    options = gaussian.ScheduleOptions("empirical", k=3.0, t0=0.4)
    assert gaussian.make_schedule(options) == gaussian.EmpiricalSchedule(3.0, 0.4)
    for k, t0 in ((0.0, 0.5), (4.0, 1.0), (17.0, 0.5)):
        with pytest.raises(ValueError, match="k max"):
            gaussian.EmpiricalSchedule(k, t0)
