"""Average velocities against the closed-form flow of Gaussian data, and laws of sampled times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diladiff_jax.diffusion import gaussian, meanflow

MEAN, STD = 0.7, 0.6  # the data: N(MEAN, STD^2) in every coordinate
SCHEDULES = [
    gaussian.TangentSchedule(1.0),
    gaussian.TangentSchedule(10.0),
    gaussian.LinearVarianceSchedule(),
]
FORMS = list(meanflow.STEP_FORMS)
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
each_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def deviation(schedule, t):
    """Standard deviation of z_t."""
    return jnp.sqrt((schedule.alpha(t) * STD) ** 2 + schedule.sigma(t) ** 2)


def posterior_mean(schedule, z_t, t):
    """E[z | z_t]."""
    alpha, s = (
        gaussian.per_example(schedule.alpha(t), z_t),
        gaussian.per_example(deviation(schedule, t), z_t),
    )
    return MEAN + alpha * STD**2 / s**2 * (z_t - alpha * MEAN)


def flow(schedule, z_t, t, r):
    """The probability flow from t to r: it keeps the standardized value."""
    ratio = gaussian.per_example(deviation(schedule, r) / deviation(schedule, t), z_t)
    return gaussian.per_example(schedule.alpha(r), z_t) * MEAN + ratio * (
        z_t - gaussian.per_example(schedule.alpha(t), z_t) * MEAN
    )


def points(seed=0, n=64):
    rng = np.random.default_rng(seed)
    t = rng.uniform(0.2, 0.97, n)
    r = t * rng.uniform(0.05, 0.9, n)
    return jnp.asarray(rng.normal(size=(n, 2, 3))), jnp.asarray(t), jnp.asarray(r)


@each_schedule
def test_the_exact_flow_has_no_error_against_its_own_target(schedule, x64):
    """u = (z - Phi_{t->r}(z)) / (t - r) satisfies u = v - (t - r)(v du/dz + du/dt).

    v is the velocity of E[z | z_t].
    """
    z_t, t, r = points()
    u = lambda z, t, r: (z - flow(schedule, z, t, r)) / gaussian.per_example(t - r, z)
    v = gaussian.velocity_of_clean(schedule, z_t, posterior_mean(schedule, z_t, t), t)
    value, target = jax.jit(lambda z, t, r, v: meanflow.average_velocity_target(u, z, t, r, v))(
        z_t, t, r, v
    )
    np.testing.assert_allclose(value, target, rtol=1e-8, atol=1e-8)
    _, wrong = meanflow.average_velocity_target(u, z_t, t, r, 1.1 * v)
    assert np.abs(value - wrong).max() > 1e-2


def test_target_is_the_formula_by_finite_differences(x64):
    """For any smooth u, the bracket is its directional derivative along (v, 1, 0), scaled by w.

    w = 0 leaves v.
    """
    z_t, t, r = points(1)
    v = jnp.sin(3 * z_t)
    u = lambda z, t, r: jnp.tanh(z * z[:, ::-1]) * gaussian.per_example(jnp.cos(2 * t) + r * t, z)
    h = 1e-5
    bracket = (u(z_t + h * v, t + h, r) - u(z_t - h * v, t - h, r)) / (2 * h)
    for w in (0.0, 0.3, 1.0):
        value, target = meanflow.average_velocity_target(u, z_t, t, r, v, w)
        np.testing.assert_allclose(value, u(z_t, t, r), rtol=1e-12)
        np.testing.assert_allclose(
            target, v - w * (t - r)[:, None, None] * bracket, rtol=1e-7, atol=1e-7
        )


def test_target_carries_no_gradient():
    """The target's gradient in the student's parameter and in v is exactly zero; u's is not."""
    z_t, t, r = (jnp.asarray(x, jnp.float32) for x in points(2))

    def both(a, v):
        return meanflow.average_velocity_target(
            lambda z, t, r: a * jnp.sin(z) * gaussian.per_example(t, z), z_t, t, r, v
        )

    by_parameter, by_velocity = jax.grad(lambda a, v: both(a, v)[1].sum(), argnums=(0, 1))(1.3, z_t)
    assert by_parameter == 0 and (by_velocity == 0).all()
    assert jax.grad(lambda a: both(a, z_t)[0].sum())(1.3) != 0


def test_adaptive_loss_and_its_gradient():
    """The loss is e / (e + c) with e summed over the latent.

    Its gradient is 2 (u - target) / (e + c), because the denominator is held fixed.
    """
    u, target = jax.random.normal(jax.random.key(0), (2, 4, 2, 3))
    loss, error = meanflow.adaptive_loss(u, target, 5.0)
    e = ((np.asarray(u) - np.asarray(target)) ** 2).reshape(4, -1).sum(axis=1)
    np.testing.assert_allclose(error, e, rtol=1e-6)
    np.testing.assert_allclose(loss, e / (e + 5), rtol=1e-6)
    grad = jax.jit(jax.grad(lambda u: meanflow.adaptive_loss(u, target, 5.0)[0].sum()))(u)
    np.testing.assert_allclose(grad, 2 * (u - target) / (e + 5)[:, None, None], rtol=1e-5)


@each_schedule
@each_form
def test_at_equal_times_every_form_is_the_velocity(form, schedule, x64):
    """u(z_t, t, t) = v(z_t, t), and Phi of it is the prediction, as in self-conditioning."""
    z_t, t, _ = points(3)
    z = jnp.cos(z_t)
    u = meanflow.STEP_FORMS[form](schedule, z_t, z, t, t)
    np.testing.assert_allclose(
        u, gaussian.velocity_of_clean(schedule, z_t, z, t), rtol=1e-9, atol=1e-9
    )
    np.testing.assert_allclose(
        gaussian.clean_of_velocity(schedule, z_t, u, t), z, rtol=1e-9, atol=1e-9
    )


@each_schedule
def test_velocity_form_is_the_same_for_every_r(schedule):
    """The paper's start: u(z, t, r) is the velocity at t for every r, a straight step."""
    z_t, t, r = points(4)
    z = jnp.cos(z_t)
    u = meanflow.velocity_from_prediction(schedule, z_t, z, t, r)
    np.testing.assert_array_equal(u, gaussian.velocity_of_clean(schedule, z_t, z, t))


@each_schedule
def test_rotation_form_steps_as_ddim(schedule, x64):
    """z_t - (t - r) u = ddim_step(t -> r) for every r, from just below t down to 0.

    At r = 0 the step lands on the prediction.
    """
    z_t, t, _ = points(5)
    z = jnp.cos(z_t)
    for share, atol in ((0.0, 1e-10), (0.5, 1e-10), (0.99, 1e-10), (0.9995, 1e-7)):
        r = share * t
        step = z_t - (t - r)[:, None, None] * meanflow.rotation_from_prediction(
            schedule, z_t, z, t, r
        )
        np.testing.assert_allclose(step, gaussian.ddim_step(schedule, z_t, z, t, r), atol=atol)
        if share == 0:
            np.testing.assert_allclose(step, z, atol=1e-10)


@each_schedule
def test_rotation_form_is_smooth_where_its_quotient_is_replaced(schedule, x64):
    """Around t - r = 0 and 1e-3, it follows the plain quotient, computed at high precision.

    This holds for the value and for its derivatives in t and r.
    """
    z_t, t, _ = points(6)
    z = jnp.cos(z_t)
    plain = lambda t, r: (z_t - gaussian.ddim_step(schedule, z_t, z, t, r)) / (t - r)[:, None, None]
    ours = lambda t, r: meanflow.rotation_from_prediction(schedule, z_t, z, t, r)
    one, nothing = jnp.ones_like(t), jnp.zeros_like(t)
    for gap in (0.99e-3, 1.01e-3):
        r = t - gap
        for tangent in ((one, nothing), (nothing, one)):
            u, du = jax.jvp(ours, (t, r), tangent)
            expected, d_expected = jax.jvp(plain, (t, r), tangent)
            np.testing.assert_allclose(u, expected, rtol=1e-4, atol=1e-3)
            np.testing.assert_allclose(du, d_expected, rtol=2e-2, atol=2e-2)
    _, at_zero = jax.jvp(ours, (t, t), (one, nothing))
    _, nearby = jax.jvp(plain, (t, t - 1e-4), (one, nothing))
    np.testing.assert_allclose(at_zero, nearby, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("schedule", SCHEDULES[:2], ids=repr)
@each_form
def test_forms_and_tangents_are_finite_in_float32_at_every_corner(form, schedule):
    """t = 1, r = 0, r = t and gaps of one rounding error: value, jvp and gradient all finite."""
    t = jnp.array([1.0, 1.0, 1.0, 0.5, 0.5, 1e-3, 1e-3, 0.5], jnp.float32)
    r = jnp.array([1.0, 0.0, 1 - 6e-8, 0.5, 0.5 - 3e-8, 1e-3, 0.0, 0.499], jnp.float32)
    z_t, z = jax.random.normal(jax.random.key(0), (2, 8, 2, 3))

    def u(z_t, t, r, z):
        return meanflow.STEP_FORMS[form](schedule, z_t, z, t, r)

    value, tangent = jax.jvp(u, (z_t, t, r, z), (z, jnp.ones(8), jnp.zeros(8), z_t))
    grads = jax.grad(lambda *a: jnp.square(u(*a)).sum(), argnums=(0, 1, 2, 3))(z_t, t, r, z)
    assert all(np.isfinite(x).all() for x in (value, tangent, *grads))


def test_times_follow_their_law():
    """r <= t, and P(r = t) = 1/4 (z < 4.5, false alarm 7e-6).

    Where they differ, t and r are the larger and the smaller of two LogitNormal(-1, 1)
    (Kolmogorov-Smirnov, false alarm 1e-4 each).
    """
    n = 40_000
    t, r = (
        np.asarray(x, np.float64)
        for x in jax.jit(meanflow.sample_times, static_argnums=1)(jax.random.key(0), n)
    )
    assert ((r > 0) & (r <= t) & (t < 1)).all()
    same = r == t
    assert abs(same.mean() - 0.25) < 4.5 * np.sqrt(0.25 * 0.75 / n)
    single = lambda x: scipy.stats.norm.cdf(np.log(x / (1 - x)) + 1)
    for sample in (t, t[same]):
        assert scipy.stats.kstest(sample, lambda x: single(x) ** 2).pvalue > 1e-4
    assert scipy.stats.kstest(r[~same], lambda x: 1 - (1 - single(x)) ** 2).pvalue > 1e-4


def test_shares_of_ends():
    """`p_noise` sets t = 1, `p_clean` r = 0 and `p_equal` r = t, each with its probability.

    z < 4.5, false alarm 7e-6 each.
    """
    n = 40_000
    t, r = meanflow.sample_times(
        jax.random.key(1), n, mean=0.0, std=2.0, p_equal=0.1, p_noise=0.3, p_clean=0.2
    )
    for found, share in (((t == 1), 0.3), ((r == 0), 0.9 * 0.2), ((t == r), 0.1)):
        assert abs(found.mean() - share) < 4.5 * np.sqrt(share * (1 - share) / n)
    t, r = meanflow.sample_times(jax.random.key(1), 100, p_equal=1.0)
    np.testing.assert_array_equal(t, r)


@each_schedule
def test_renoised_state_has_exactly_the_level_of_s(schedule, x64):
    """The signal of (alpha_s / alpha_r) z_r + gamma sigma_s eps is alpha_s, its noise sigma_s^2.

    r <= s. gamma = 0 gives r = s, and s = 0 gives r = 0.
    """
    s = jnp.linspace(0.0, 0.99, 50)
    for gamma in (0.0, 0.3, 0.8, 0.99):
        r = meanflow.renoise_time(schedule, s, gamma)
        assert (r <= s + 1e-12).all() and r[0] == 0
        if gamma == 0:
            np.testing.assert_allclose(r, s, atol=1e-12)
        else:
            assert (r[1:] < s[1:]).all()
        scale = schedule.alpha(s) / schedule.alpha(r)
        noise = (scale * schedule.sigma(r)) ** 2 + (gamma * schedule.sigma(s)) ** 2
        np.testing.assert_allclose(noise, schedule.sigma(s) ** 2, rtol=1e-9, atol=1e-15)


def test_everything_maps_over_examples():
    """`average_velocity_target` under jit and vmap over single examples equals the batch."""
    schedule = gaussian.TangentSchedule(3.0)
    z_t, t, r = (jnp.asarray(x, jnp.float32) for x in points(7, 8))
    u = lambda z, t, r: meanflow.rotation_from_prediction(schedule, z, jnp.tanh(z), t, r)
    whole = meanflow.average_velocity_target(u, z_t, t, r, z_t)
    each = jax.jit(
        jax.vmap(
            lambda z, t, r: jax.tree.map(
                lambda x: x[0],
                meanflow.average_velocity_target(u, z[None], t[None], r[None], z[None]),
            )
        )
    )
    for a, b in zip(whole, each(z_t, t, r), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
