"""Stage 4: the student, an average velocity distilled from the prior.

See "Student" in docs/method.md.
"""

from __future__ import annotations

import dataclasses

import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diladiff_jax.diffusion import gaussian, meanflow
from diladiff_jax.nn.call import apply
from diladiff_jax.nn.latent_denoiser import LatentDenoiser
from diladiff_jax.objectives.base import WHOLE, Context, LossOutput, Params, Part
from diladiff_jax.objectives.encoding import TextEncoder
from diladiff_jax.objectives.ladiff import init_latent_denoiser
from diladiff_jax.options import Options, above, at_least, between, key_of, one_of, setting


@dataclasses.dataclass(frozen=True)
class DiLaDiffOptions(Options):
    """Options of the MeanFlow distillation; the defaults are published."""

    step_form: str = setting(
        "velocity",
        "how the student's prediction becomes an average velocity: the paper's straight step, or "
        "the teacher's DDIM step",
        key_of(meanflow.STEP_FORMS),
    )
    teacher_noise: str = setting(
        "implied",
        "noise of the teacher's velocity: implied by its prediction, or drawn (the literal form)",
        one_of("implied", "drawn"),
    )
    time_mean: float = setting(-1.0, "location of the logit-normal times")
    time_std: float = setting(1.0, "scale of the logit-normal times", above(0))
    p_equal: float = setting(0.25, "share of the examples with r = t", between(0, 1))
    p_noise: float = setting(0.0, "share of the examples with t = 1", between(0, 1))
    p_clean: float = setting(0.0, "share of the examples with r = 0", between(0, 1))
    self_conditioning: float = setting(
        0.5, "share of the examples that are self-conditioned", between(0, 1)
    )
    tangent_warmup: int = setting(10_000, "steps until the tangent has full weight", at_least(0))
    loss_offset: float = setting(5.0, "c in the loss's weight 1 / (error + c)", above(0))


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
    self_condition: Float[Array, "B N D"],
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
    """MeanFlow distillation of the prior.

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
        tokens: Int[Array, "B L"],
        key: PRNGKeyArray,
        step: Int[Array, ""] | int,
        *,
        train: bool = True,
        part: Part = WHOLE,
    ) -> LossOutput:
        """See `Objective.loss`."""
        time_key, noise_key, half_key = jax.random.split(jax.random.fold_in(key, part.index), 3)
        options = self.options
        z = self.text_encoder(context.frozen, context.statistics, tokens)
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
        noise = jax.random.normal(noise_key, z.shape)
        z_t = gaussian.diffuse(self.schedule, z, noise, t)
        # 2. The teacher's velocity at (z_t, t).
        v = self._teacher_velocity(context, z_t, t, noise)
        # 3. The student's self-conditioning, Phi(u(z_t, t, t), t): at r = t that is the network's
        # own prediction.
        with jax.default_matmul_precision("float32"):
            own = apply(self.network, params, z_t, t, None, jnp.zeros_like(t))
        chosen = jax.random.bernoulli(half_key, options.self_conditioning, (z.shape[0], 1, 1))
        self_condition = jax.lax.stop_gradient(jnp.where(chosen, own, 0.0))

        # 4. Average velocity against its MeanFlow target.
        def u(z_t: Array, t: Array, r: Array) -> Array:
            return average_velocity(
                self.network, params, self.schedule, options.step_form, z_t, t, r, self_condition
            )

        warmup = options.tangent_warmup if train else 0
        warm = jnp.minimum(1.0, step / warmup) if warmup else 1.0
        student, target = meanflow.average_velocity_target(u, z_t, t, r, v, warm)
        loss, error = meanflow.adaptive_loss(student, target, options.loss_offset)
        size = z.shape[1] * z.shape[2]
        metrics = {
            "error": error.mean() / size,
            "target_norm": jnp.sqrt(jnp.square(target).mean()),
        }
        return loss.mean(), (metrics, context.statistics)

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
