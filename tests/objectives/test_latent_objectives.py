"""The prior's loss and the student's."""

import dataclasses

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diladiff_jax.diffusion import gaussian, meanflow
from diladiff_jax.objectives.diladiff import average_velocity, student_from_teacher
from diladiff_jax.objectives.ladiff import LaDiffOptions

KEY = jax.random.key(7)


def test_latents_are_standardized_and_without_gradient(text_encoder, context, latents, tokens):
    """Latents of the batch behind the statistics have mean 0 and variance 1 per coordinate.

    No gradient reaches the encoder.
    """
    np.testing.assert_allclose(latents.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(latents.std(axis=0), 1, rtol=1e-2)
    grads = jax.grad(lambda frozen: text_encoder(frozen, context.statistics, tokens).sum())(
        context.frozen
    )
    assert all((g == 0).all() for g in jax.tree.leaves(grads))


# LaDiff.


def test_loss_of_the_initial_prior_is_the_mean_square_of_the_latents(
    ladiff, context, latents, tokens
):
    """A network that predicts zero has loss E z^2, a mean over batch, latents and coordinates."""
    params = nn.unbox(jax.jit(ladiff.init)(jax.random.key(0)))
    loss, (metrics, _) = jax.jit(ladiff.loss)(params, context, tokens, KEY, 0)
    np.testing.assert_allclose(loss, (np.asarray(latents) ** 2).mean(), rtol=1e-5)
    time_key = jax.random.split(jax.random.fold_in(KEY, 0), 3)[0]
    low = np.asarray(jax.random.uniform(time_key, (16,))) < 0.5
    each = (np.asarray(latents) ** 2).mean(axis=(1, 2))
    np.testing.assert_allclose(
        [metrics["error_low_noise"], metrics["error_high_noise"]],
        [each[low].mean(), each[~low].mean()],
        rtol=1e-5,
    )


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_prior_is_conditioned_on_its_own_detached_prediction(
    ladiff, context, latents, tokens, share
):
    """Value and gradient: of predict(z_t, stop_gradient(predict(z_t, 0))) at share 1.

    At share 0, of predict(z_t, 0).
    """
    objective = dataclasses.replace(ladiff, options=LaDiffOptions(self_conditioning=share))
    params = context.frozen["teacher"]
    time_key, noise_key, _ = jax.random.split(jax.random.fold_in(KEY, 0), 3)
    t = jax.random.uniform(time_key, (16,))
    z_t = gaussian.diffuse(ladiff.schedule, latents, jax.random.normal(noise_key, latents.shape), t)
    predict = lambda p, c: ladiff.network.apply({"params": p}, z_t, t, c)
    given = predict(params, None) if share else jnp.zeros_like(z_t)
    expected = jax.jit(
        jax.value_and_grad(lambda p: jnp.square(predict(p, given) - latents).mean())
    )(params)
    found = jax.jit(jax.value_and_grad(lambda p: objective.loss(p, context, tokens, KEY, 0)[0]))(
        params
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, expected
    )


def test_prior_is_self_conditioned_on_half_of_the_batches(ladiff, context, tokens):
    """Of 400 keys, half give the self-conditioned loss (4.5 sigma, false alarm 7e-6)."""
    params = context.frozen["teacher"]

    def losses(share):
        objective = dataclasses.replace(ladiff, options=LaDiffOptions(self_conditioning=share))
        loss = lambda key: objective.loss(params, context, tokens, key, 0)[0]
        return jax.jit(lambda keys: jax.lax.map(loss, keys))(jax.random.split(KEY, 400))

    without, always, half = losses(0.0), losses(1.0), losses(0.5)
    conditioned = np.isclose(half, always, rtol=1e-5)
    assert (conditioned | np.isclose(half, without, rtol=1e-5)).all()
    assert not np.isclose(without, always, rtol=1e-5).any()
    assert abs(conditioned.mean() - 0.5) < 4.5 * 0.5 / np.sqrt(400)


# DiLaDiff.


@pytest.fixture(scope="module")
def student(make_diladiff, context):
    """The initial student: the teacher's parameters and a zero interval embedding."""
    fresh = nn.unbox(jax.jit(make_diladiff().init)(jax.random.key(1)))
    return student_from_teacher(fresh, context.frozen["teacher"])


def test_student_takes_everything_from_the_teacher(student, context, make_diladiff):
    """It adds `interval_time` only; a teacher with parameters that it lacks is an error."""
    ours, theirs = (
        flax.traverse_util.flatten_dict(student),
        flax.traverse_util.flatten_dict(context.frozen["teacher"]),
    )
    assert {path[0] for path in ours.keys() - theirs.keys()} == {"interval_time"}
    for path, value in theirs.items():
        np.testing.assert_array_equal(ours[path], value)
    with pytest.raises(ValueError, match="student lacks the teacher's parameter"):
        student_from_teacher({}, context.frozen["teacher"])


@pytest.mark.parametrize("form", ["velocity", "rotation"])
def test_student_starts_as_the_teacher(form, student, context, latents, make_diladiff):
    """For every r, "velocity" gives the teacher's velocity at t, "rotation" its DDIM step to r."""
    objective = make_diladiff(step_form=form)
    schedule, z_t, c = objective.schedule, latents, jnp.sin(latents)
    t = jnp.linspace(0.2, 1.0, 16)
    taught = objective.teacher.apply({"params": context.frozen["teacher"]}, z_t, t, c)
    u = jax.jit(
        lambda r: average_velocity(objective.network, student, schedule, form, z_t, t, r, c)
    )
    for share in (0.0, 0.5, 1.0):
        r = share * t
        if form == "velocity" or share == 1.0:
            np.testing.assert_allclose(
                u(r), gaussian.velocity_of_clean(schedule, z_t, taught, t), rtol=1e-3, atol=1e-3
            )
        else:
            stepped = z_t - (t - r)[:, None, None] * u(r)
            np.testing.assert_allclose(
                stepped, gaussian.ddim_step(schedule, z_t, taught, t, r), rtol=1e-3, atol=1e-3
            )


def reference_loss(objective, params, context, latents, key, step):
    """(loss, error) of a second implementation, with finite differences for the tangent."""
    options = objective.options
    time_key, noise_key, half_key = jax.random.split(jax.random.fold_in(key, 0), 3)
    t, r = meanflow.sample_times(time_key, 16, p_equal=options.p_equal)
    noise = jax.random.normal(noise_key, latents.shape)
    alpha, sigma = (
        objective.schedule.alpha(t)[:, None, None],
        objective.schedule.sigma(t)[:, None, None],
    )
    rate = objective.schedule.angle_rate(t)[:, None, None]
    z_t = alpha * latents + sigma * noise
    teach = lambda c: objective.teacher.apply({"params": context.frozen["teacher"]}, z_t, t, c)
    taught = teach(teach(jnp.zeros_like(z_t)))
    eps = noise if options.teacher_noise == "drawn" else (z_t - alpha * taught) / sigma
    v = rate * (alpha * eps - sigma * taught)  # alpha' z + sigma' eps
    zero = jnp.zeros_like(z_t)
    u_at = lambda z, t, r, c: average_velocity(
        objective.network, params, objective.schedule, options.step_form, z, t, r, c
    )
    # Phi(u(z_t, t, t), t), in the paper's own form.
    u_tt = u_at(z_t, t, t, zero)
    clean = (sigma * u_tt - alpha * rate * z_t) / (-sigma * sigma * rate - alpha * rate * alpha)
    chosen = jax.random.bernoulli(half_key, options.self_conditioning, (16, 1, 1))
    c = jnp.where(chosen, clean, 0)
    h = 2e-3
    bracket = (u_at(z_t + h * v, t + h, r, c) - u_at(z_t - h * v, t - h, r, c)) / (2 * h)
    target = v - step / options.tangent_warmup * (t - r)[:, None, None] * bracket
    error = jnp.square(u_at(z_t, t, r, c) - target).sum(axis=(1, 2))
    return (error / (error + options.loss_offset)).mean(), error.mean() / 24


@pytest.mark.parametrize(
    "options",
    [
        dict(step_form="velocity", teacher_noise="implied"),
        dict(step_form="rotation", teacher_noise="implied", self_conditioning=1.0),
        dict(step_form="velocity", teacher_noise="drawn", self_conditioning=0.0),
    ],
    ids=["paper", "rotation", "drawn"],
)
def test_the_loss_is_algorithm_4_of_the_paper(
    options, student, context, latents, tokens, make_diladiff, perturb
):
    """Compared with a second implementation, at the start and in the middle of the warm-up."""
    objective = make_diladiff(tangent_warmup=100, **options)
    params = perturb(student, 2, 0.05)
    params["interval_time"] = perturb(params["interval_time"], 3, 0.5)
    ours = jax.jit(objective.loss)
    reference = jax.jit(lambda p, step: reference_loss(objective, p, context, latents, KEY, step))
    # Without the tangent, and with half of it, which the reference takes by finite differences.
    for step, rtol in ((0, 2e-4), (50, 2e-2)):
        loss, (metrics, _) = ours(params, context, tokens, KEY, step)
        expected, error = reference(params, step)
        np.testing.assert_allclose(metrics["error"], error, rtol=rtol)
        np.testing.assert_allclose(loss, expected, rtol=rtol)


def test_gradient_is_that_of_u_alone(student, context, latents, tokens, make_diladiff, perturb):
    """Target, weights and self-conditioning are constants of the gradient.

    Compared at r = t, where the target is the teacher's velocity.
    """
    objective = make_diladiff(p_equal=1.0)
    params = perturb(student, 2, 0.05)
    time_key, noise_key, half_key = jax.random.split(jax.random.fold_in(KEY, 0), 3)
    t, _ = meanflow.sample_times(time_key, 16, p_equal=1.0)
    z_t = gaussian.diffuse(
        objective.schedule, latents, jax.random.normal(noise_key, latents.shape), t
    )
    teach = lambda c: objective.teacher.apply({"params": context.frozen["teacher"]}, z_t, t, c)
    v = gaussian.velocity_of_clean(objective.schedule, z_t, teach(teach(None)), t)
    own = objective.network.apply({"params": params}, z_t, t, None, jnp.zeros_like(t))
    c = jnp.where(jax.random.bernoulli(half_key, 0.5, (16, 1, 1)), own, 0.0)
    velocity = lambda p: gaussian.velocity_of_clean(
        objective.schedule,
        z_t,
        objective.network.apply({"params": p}, z_t, t, c, jnp.zeros_like(t)),
        t,
    )
    weight = 1 / (jnp.square(velocity(params) - v).sum(axis=(1, 2)) + 5.0)
    expected = jax.jit(
        jax.grad(lambda p: (weight * jnp.square(velocity(p) - v).sum(axis=(1, 2))).mean())
    )(params)
    found = jax.jit(jax.grad(lambda p: objective.loss(p, context, tokens, KEY, 10_000)[0]))(params)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected))
    assert scale > 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3 * scale), found, expected
    )


def test_gradients_are_finite_at_every_corner_of_time(student, context, tokens, make_diladiff):
    """With t = 1 and r = 0 in half of the examples each, loss and gradient are finite."""
    objective = make_diladiff(step_form="rotation", p_noise=0.5, p_clean=0.5)
    loss, grads = jax.jit(
        jax.value_and_grad(lambda p: objective.loss(p, context, tokens, KEY, 10_000)[0])
    )(student)
    assert np.isfinite(loss) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_tangent_warms_up_linearly_from_flow_matching(
    student, context, tokens, make_diladiff, perturb
):
    """From the teacher's velocity at step 0 to the full tangent at `tangent_warmup` and after.

    In validation the tangent has full weight.
    """
    params = perturb(student, 3, 0.05)
    objective = make_diladiff(tangent_warmup=100, p_equal=0.0)
    run = jax.jit(objective.loss, static_argnames="train")
    error = lambda step, **kw: run(params, context, tokens, KEY, step, **kw)[1][0]["target_norm"]
    assert error(100) == error(5_000) == error(0, train=False)
    # |v - w k|^2 is quadratic in w: three points give the fourth.
    square = [float(error(step)) ** 2 for step in (0, 25, 50, 100)]
    a, b, c = np.linalg.solve([[0, 0, 1], [0.0625, 0.25, 1], [0.25, 0.5, 1]], square[:3])
    np.testing.assert_allclose(a + b + c, square[3], rtol=1e-2)
    assert abs(square[3] - square[0]) > 1e-3 * square[0]


# Jumps.

JUMPS = dict(step_form="rotation", self_conditioning=0.0, teacher_steps=3)


def reference_jump_error(objective, params, context, latents, key):
    """Mean squared error of the student's prediction, of a second implementation."""
    schedule, options = objective.schedule, objective.options
    time_key, noise_key, _ = jax.random.split(jax.random.fold_in(key, 0), 3)
    t, r, n = meanflow.sample_jumps(time_key, 16, options.step_counts)
    noise = jax.random.normal(noise_key, latents.shape)
    at = lambda f, x: f(x)[:, None, None]
    z_t = at(schedule.alpha, t) * latents + at(schedule.sigma, t) * noise
    teach = lambda z, t, c: objective.teacher.apply({"params": context.frozen["teacher"]}, z, t, c)
    learn = lambda z, t, r: objective.network.apply({"params": params}, z, t, None, t - r)

    def rotate(z, clean, t, r):
        eps = (z - at(schedule.alpha, t) * clean) / at(schedule.sigma, t)
        return at(schedule.alpha, r) * clean + at(schedule.sigma, r) * eps

    z, seen = z_t, teach(z_t, t, None)
    for i in range(options.teacher_steps):
        here, there = (t + (r - t) * (k / options.teacher_steps) for k in (i, i + 1))
        seen = teach(z, here, seen)
        z = rotate(z, seen, here, there)
    if options.distillation == "shortcut":
        middle = (t + r) / 2
        half = rotate(z_t, learn(z_t, t, middle), t, middle)
        halves = rotate(half, learn(half, middle, r), middle, r)
        z = jnp.where((n == max(options.step_counts))[:, None, None], z, halves)
    # The clean latent of the rotation through z_t and z: two equations for it and for the noise.
    matrix = jnp.stack(
        [
            jnp.stack([schedule.alpha(t), schedule.sigma(t)], axis=-1),
            jnp.stack([schedule.alpha(r), schedule.sigma(r)], axis=-1),
        ],
        axis=1,
    )
    both = jnp.stack([z_t, z], axis=1).reshape(16, 2, -1)
    target = jnp.linalg.solve(matrix, both)[:, 0].reshape(z_t.shape)
    return jnp.square(learn(z_t, t, r) - target).mean()


@pytest.mark.parametrize("distillation", ["progressive", "shortcut"])
def test_a_jump_leads_where_several_steps_lead(
    distillation, student, context, latents, tokens, make_diladiff, perturb
):
    """The loss equals that of a second implementation, and its gradient is the prediction's."""
    objective = make_diladiff(distillation=distillation, **JUMPS)
    params = perturb(student, 2, 0.05)
    params["interval_time"] = perturb(params["interval_time"], 3, 0.5)
    found = jax.jit(lambda p: objective.loss(p, context, tokens, KEY, 0)[0])(params)
    expected = jax.jit(lambda p: reference_jump_error(objective, p, context, latents, KEY))(params)
    np.testing.assert_allclose(found, expected, rtol=2e-3)


def test_with_one_step_of_the_teacher_the_student_starts_at_no_error(
    student, context, tokens, make_diladiff
):
    """The target is the teacher's own prediction, if neither is self-conditioned.

    A teacher whose self-conditioning is zeroed makes it so.
    """
    teacher = {
        name: jax.tree.map(jnp.zeros_like, value) if name.startswith("self_") else value
        for name, value in context.frozen["teacher"].items()
    }
    given = context.replace(frozen={**context.frozen, "teacher": teacher})
    params = student_from_teacher(student, teacher)
    objective = make_diladiff(distillation="progressive", **{**JUMPS, "teacher_steps": 1})
    assert float(objective.loss(params, given, tokens, KEY, 0)[0]) < 1e-6


def test_jumps_are_those_of_a_sampler():
    """0 <= r < t <= 1; half end at 0 or on an equal grid; every number of steps is as frequent."""
    t, r, n = map(np.asarray, meanflow.sample_jumps(jax.random.key(0), 40_000, (1, 2, 4)))
    assert (r >= 0).all() and (r < t).all() and (t <= 1).all()
    for count in (1, 2, 4):
        assert abs((n == count).mean() - 1 / 3) < 4.5 * np.sqrt(2 / 9 / 40_000)
        own = n == count
        # In a quarter of the cases neither end nor r is drawn: t and r are k/n and (k - 1)/n.
        grid = np.isclose(t * count, np.round(t * count), atol=1e-5)
        grid &= np.isclose(r, t - 1 / count, atol=1e-5)
        assert (grid & own).sum() > 0.24 * own.sum()
        assert abs((t[own] == 1).mean() - 1 / count) < 4.5 * np.sqrt(1 / own.sum())


def test_latents_given_in_place_of_tokens_give_the_same_loss(
    ladiff, student, context, latents, tokens, make_diladiff
):
    """Both stages read nothing else of a row, so latents may be computed once."""
    for objective, params in ((ladiff, context.frozen["teacher"]), (make_diladiff(), student)):
        run = jax.jit(lambda rows, o=objective, p=params: o.loss(p, context, rows, KEY, 3)[0])
        np.testing.assert_allclose(run(tokens), run(jnp.asarray(latents)), rtol=1e-4)
