"""Stage 4: the student, few long jumps distilled from the prior.

See "Student" in docs/method.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diladiff_jax.diffusion import gaussian, meanflow
from diladiff_jax.nn.call import apply
from diladiff_jax.nn.latent_denoiser import LatentDenoiser
from diladiff_jax.objectives.base import WHOLE, Context, LossOutput, Metrics, Params, Part
from diladiff_jax.objectives.encoding import TextEncoder
from diladiff_jax.objectives.ladiff import init_latent_denoiser
from diladiff_jax.options import Options, Rule, above, at_least, between, key_of, one_of, setting


@dataclasses.dataclass(frozen=True)
class DiLaDiffOptions(Options):
    """Options of the distillation; the defaults are published."""

    distillation: str = setting(
        "meanflow",
        "meanflow: the paper's; progressive: jumps learned from several steps of the prior; "
        "shortcut: long jumps learned from two jumps of half the length",
        one_of("meanflow", "progressive", "shortcut"),
    )
    step_counts: tuple[int, ...] = setting(
        (1, 2, 4, 8),
        "progressive and shortcut: numbers of sampling steps that the student learns",
        Rule(lambda v: len(v) > 0 and min(v) > 0, "a non-empty sequence of numbers above 0"),
    )
    teacher_steps: int = setting(
        8, "progressive and shortcut: DDIM steps of the prior in one jump", above(0)
    )
    step_form: str = setting(
        "velocity",
        "how the student's prediction becomes an average velocity: the paper's straight step, or "
        "the teacher's DDIM step",
        key_of(meanflow.STEP_FORMS),
    )
    teacher_noise: str = setting(
        "implied",
        "meanflow: noise of the teacher's velocity: implied by its prediction, or drawn (the "
        "literal form)",
        one_of("implied", "drawn"),
    )
    time_mean: float = setting(-1.0, "meanflow: location of the logit-normal times")
    time_std: float = setting(1.0, "meanflow: scale of the logit-normal times", above(0))
    p_equal: float = setting(0.25, "meanflow: share of the examples with r = t", between(0, 1))
    p_noise: float = setting(0.0, "meanflow: share of the examples with t = 1", between(0, 1))
    p_clean: float = setting(0.0, "meanflow: share of the examples with r = 0", between(0, 1))
    self_conditioning: float = setting(
        0.5, "share of the examples that are self-conditioned", between(0, 1)
    )
    tangent_warmup: int = setting(
        10_000, "meanflow: steps until the tangent has full weight", at_least(0)
    )
    loss_offset: float = setting(5.0, "meanflow: c in the loss's weight 1 / (error + c)", above(0))

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Jumps are learned as predictions of a clean latent to rotate towards."""
        if self.distillation != "meanflow" and self.step_form != "rotation":
            yield "step_form", f"rotation when distillation is {self.distillation}"


def student_from_teacher(student: Params, teacher: Params) -> Params:
    """The teacher's parameters, and the student's own interval embedding, which the teacher lacks.

    Raises:
      ValueError: the teacher has a parameter that the student lacks.
    """
    ours, theirs = map(flax.traverse_util.flatten_dict, (student, teacher))
    if missing := sorted(theirs.keys() - ours.keys()):
        raise ValueError(f"the student lacks the teacher's parameter {'/'.join(missing[0])}")
    return flax.traverse_util.unflatten_dict({**ours, **theirs})


def average_velocity(
    network: LatentDenoiser,
    params: Params,
    schedule: gaussian.Schedule,
    step_form: str,
    z_t: Float[Array, "B N D"],
    t: Float[Array, " B"],
    r: Float[Array, " B"],
    self_condition: Float[Array, "B N D"] | None,
) -> Float[Array, "B N D"]:
    """u(z_t, t, r) from the network's clean prediction.

    `step_form` "velocity": u is that prediction's velocity at t, so the student starts as the
    teacher's velocity for every r, as in the paper. "rotation": u leads to r along the rotation,
    so it starts as the teacher's DDIM step.
    """
    with jax.default_matmul_precision("float32"):
        z = apply(network, params, z_t, t, self_condition, t - r)
    return meanflow.STEP_FORMS[step_form](schedule, z_t, z, t, r)


@dataclasses.dataclass(frozen=True, eq=False)
class DiLaDiff:
    """Distillation of the prior: MeanFlow, or jumps learned from several steps.

    The student and its tangents are computed in float32, with float32 products (accelerators round
    the factors of float32 products by default) and plain attention, since fused kernels define no
    forward derivative. The frozen networks compute as they were trained.

    Attributes:
      text_encoder: the frozen path from tokens to standardized latents.
      teacher: the prior's network.
      network: the student, with `interval=True`.
      schedule: the noise schedule.
      options: see `DiLaDiffOptions`.
    """

    text_encoder: TextEncoder
    teacher: LatentDenoiser
    network: LatentDenoiser
    schedule: gaussian.Schedule
    options: DiLaDiffOptions = dataclasses.field(default_factory=DiLaDiffOptions)

    def init(self, key: PRNGKeyArray) -> Params:
        """See `Objective.init`."""
        return init_latent_denoiser(self.network, self.text_encoder.encoder.num_latents, key)

    def loss(
        self,
        params: Params,
        context: Context,
        tokens: Int[Array, "B L"] | Float[Array, "B N D"],
        key: PRNGKeyArray,
        step: Int[Array, ""] | int,
        *,
        train: bool = True,
        part: Part = WHOLE,
    ) -> LossOutput:
        """See `Objective.loss`."""
        keys = jax.random.split(jax.random.fold_in(key, part.index), 3)
        z = self.text_encoder.latents(context, tokens)
        if self.options.distillation == "meanflow":
            loss, metrics = self._meanflow(params, context, z, keys, step if train else None)
        else:
            loss, metrics = self._jump(params, context, z, keys)
        return loss, (metrics, context.statistics)

    def _meanflow(
        self, params: Params, context: Context, z: Array, keys: Array, step: Array | int | None
    ) -> tuple[Array, Metrics]:
        """The paper's loss; `step` None gives the tangent its full weight."""
        time_key, noise_key, half_key = keys
        options = self.options
        # 1. A noisy latent and two times.
        t, r = meanflow.sample_times(
            time_key,
            z.shape[0],
            mean=options.time_mean,
            std=options.time_std,
            p_equal=options.p_equal,
            p_noise=options.p_noise,
            p_clean=options.p_clean,
        )
        noise = jax.random.normal(noise_key, z.shape, jnp.float32)
        z_t = gaussian.diffuse(self.schedule, z, noise, t)
        # 2. The teacher's velocity at (z_t, t).
        v = self._teacher_velocity(context, z_t, t, noise)
        # 3. The student's self-conditioning.
        self_condition = self._self_condition(params, z_t, t, half_key)

        # 4. Average velocity against its MeanFlow target.
        def u(z_t: Array, t: Array, r: Array) -> Array:
            return average_velocity(
                self.network, params, self.schedule, options.step_form, z_t, t, r, self_condition
            )

        warm = 1.0
        if step is not None and options.tangent_warmup:
            warm = jnp.minimum(1.0, step / options.tangent_warmup)
        student, target = meanflow.average_velocity_target(u, z_t, t, r, v, warm)
        loss, error = meanflow.adaptive_loss(student, target, options.loss_offset)
        metrics = {
            "error": error.mean() / (z.shape[1] * z.shape[2]),
            "target_norm": jnp.sqrt(jnp.square(target).mean()),
        }
        return loss.mean(), metrics

    def _jump(
        self, params: Params, context: Context, z: Array, keys: Array
    ) -> tuple[Array, Metrics]:
        """Squared error of the student's prediction for a jump, as in progressive distillation.

        arXiv 2202.00512, section 4, in one round and from the prior itself: the target is the clean
        latent towards which one rotation from z_t leads to where several steps lead. For DDIM steps
        it is a weighted mean of their predictions.
        """
        time_key, noise_key, half_key = keys
        t, r, count = meanflow.sample_jumps(time_key, z.shape[0], self.options.step_counts)
        z_t = gaussian.diffuse(
            self.schedule, z, jax.random.normal(noise_key, z.shape, jnp.float32), t
        )
        reached = self._teacher_steps(context, z_t, t, r)
        if self.options.distillation == "shortcut":
            # The shortest jumps are the prior's; longer ones are two jumps (arXiv 2410.12557).
            longer = count < max(self.options.step_counts)
            halves = self._two_jumps(params, z_t, t, r)
            reached = jnp.where(longer[:, None, None], halves, reached)
        target = jax.lax.stop_gradient(
            gaussian.clean_of_ddim_step(self.schedule, z_t, reached, t, r)
        )
        self_condition = self._self_condition(params, z_t, t, half_key)
        error = jnp.square(self._predict(params, z_t, t, r, self_condition) - target)
        error = error.mean(axis=(1, 2))
        longest = count == min(self.options.step_counts)
        share = jnp.sum(error * longest) / jnp.maximum(longest.sum(), 1)
        return error.mean(), {"error_longest_jumps": share}

    def _predict(
        self, params: Params, z_t: Array, t: Array, r: Array, self_condition: Array | None
    ) -> Array:
        """The student's clean latent for a jump from t to r."""
        with jax.default_matmul_precision("float32"):
            return apply(self.network, params, z_t, t, self_condition, t - r)

    def _two_jumps(self, params: Params, z_t: Array, t: Array, r: Array) -> Array:
        """Where two jumps of half the length lead."""
        middle = 0.5 * (t + r)
        for start, end in ((t, middle), (middle, r)):
            z = self._predict(params, z_t, start, end, None)
            z_t = gaussian.ddim_step(self.schedule, z_t, z, start, end)
        return z_t

    def _teacher_steps(self, context: Context, z_t: Array, t: Array, r: Array) -> Array:
        """Where `teacher_steps` DDIM steps of the prior lead from t to r."""
        steps, teacher = self.options.teacher_steps, context.frozen["teacher"]

        def body(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            z_t, previous = carry
            here, there = (t + (r - t) * i / steps for i in (k, k + 1))
            z = apply(self.teacher, teacher, z_t, here, previous)
            return gaussian.ddim_step(self.schedule, z_t, z, here, there), z

        start = apply(self.teacher, teacher, z_t, t, None)
        return jax.lax.fori_loop(0, steps, body, (z_t, start))[0]

    def _self_condition(self, params: Params, z_t: Array, t: Array, key: Array) -> Array | None:
        """Phi(u(z_t, t, t), t) in a share of the examples: at r = t the network's prediction."""
        share = self.options.self_conditioning
        if share == 0:
            return None
        own = self._predict(params, z_t, t, t, None)
        chosen = jax.random.bernoulli(key, share, (z_t.shape[0], 1, 1))
        return jax.lax.stop_gradient(jnp.where(chosen, own, 0.0))

    def _teacher_velocity(self, context: Context, z_t: Array, t: Array, noise: Array) -> Array:
        """The teacher's velocity, self-conditioned on its own first prediction; no gradient."""

        def predict(self_condition: Array | None) -> Array:
            return apply(self.teacher, context.frozen["teacher"], z_t, t, self_condition)

        z = predict(predict(None))
        if self.options.teacher_noise == "implied":
            v = gaussian.velocity_of_clean(self.schedule, z_t, z, t)
        else:
            v = gaussian.velocity_of_noise(self.schedule, z, noise, t)
        return jax.lax.stop_gradient(v)

    def group(self, path: tuple[str, ...]) -> str:
        """One group, "all"."""
        return "all"
