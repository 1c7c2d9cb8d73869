"""Stage 4: the student, an average velocity distilled from the prior (METHOD section 4)."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from diladiff_jax.diffusion import gaussian, meanflow
from diladiff_jax.nn.latent_denoiser import LatentDenoiser
from diladiff_jax.objectives.base import WHOLE, Context, Metrics, Params, Part
from diladiff_jax.objectives.encoding import TextEncoder
from diladiff_jax.objectives.ladiff import init_latent_denoiser

Array = jax.Array


def student_from_teacher(student: Params, teacher: Params) -> Params:
    """The teacher's parameters wherever it has them; the interval embedding, which it lacks, stays as initialized."""
    ours, theirs = (
        flax.traverse_util.flatten_dict(student),
        flax.traverse_util.flatten_dict(teacher),
    )
    missing = theirs.keys() - ours.keys()
    if missing:
        raise ValueError(
            f"the student has no parameter {'/'.join(sorted(missing)[0])}, which the teacher has"
        )
    return flax.traverse_util.unflatten_dict({**ours, **theirs})


def average_velocity(
    network: LatentDenoiser,
    params: Params,
    schedule: gaussian.Schedule,
    step_form: str,
    z_t: Array,
    t: Array,
    r: Array,
    self_condition: Array,
) -> Array:
    """u(z_t, t, r), `[B, N, D]`, from the network's clean prediction.

    `step_form` "velocity": u is that prediction's velocity at t (the paper's start: the teacher's velocity for
    every r). "rotation": u leads to r along the rotation, so the start is the teacher's DDIM step.
    """
    with jax.default_matmul_precision("float32"):
        z = network.apply({"params": params}, z_t, t, self_condition, t - r)
    return meanflow.STEP_FORMS[step_form](schedule, z_t, z, t, r)


@dataclasses.dataclass(frozen=True, eq=False)
class DiLaDiff:
    """MeanFlow distillation. The student and its tangents are float32 to the last product (accelerators round the
    factors of float32 products by default); attention in its plain form. The frozen networks compute as they were trained."""

    text_encoder: TextEncoder
    teacher: LatentDenoiser
    network: LatentDenoiser  # the student: interval=True
    schedule: gaussian.Schedule
    step_form: str = "velocity"
    teacher_noise: str = "implied"  # or "drawn", the literal form of the paper's algorithm 4
    time_mean: float = -1.0
    time_std: float = 1.0
    p_equal: float = 0.25
    p_noise: float = 0.0
    p_clean: float = 0.0
    self_conditioning: float = 0.5  # share of the examples
    tangent_warmup: int = 10_000
    loss_offset: float = 5.0

    def init(self, key: Array) -> Params:
        return init_latent_denoiser(self.network, self.text_encoder.encoder.num_latents, key)

    def loss(
        self,
        params: Params,
        context: Context,
        tokens: Array,
        key: Array,
        step: Array,
        *,
        train: bool = True,
        part: Part = WHOLE,
    ) -> tuple[Array, tuple[Metrics, dict[str, Any]]]:
        time_key, noise_key, half_key = jax.random.split(jax.random.fold_in(key, part.index), 3)
        z = self.text_encoder(context.frozen, context.statistics, tokens)
        # 1. A noisy latent and two times.
        t, r = meanflow.sample_times(
            time_key,
            z.shape[0],
            mean=self.time_mean,
            std=self.time_std,
            p_equal=self.p_equal,
            p_noise=self.p_noise,
            p_clean=self.p_clean,
        )
        noise = jax.random.normal(noise_key, z.shape)
        z_t = gaussian.diffuse(self.schedule, z, noise, t)

        # 2. The teacher's velocity at (z_t, t), self-conditioned on its own first prediction.
        def teach(self_condition: Array | None) -> Array:
            return self.teacher.apply({"params": context.frozen["teacher"]}, z_t, t, self_condition)

        taught = teach(teach(None))
        if self.teacher_noise == "implied":
            v = gaussian.velocity_of_clean(self.schedule, z_t, taught, t)
        else:
            v = gaussian.velocity_of_noise(self.schedule, taught, noise, t)
        v = jax.lax.stop_gradient(v)

        # 3. The student's self-conditioning, Phi(u(z_t, t, t), t): at r = t that is the network's own prediction.
        with jax.default_matmul_precision("float32"):
            own = self.network.apply({"params": params}, z_t, t, None, jnp.zeros_like(t))
        chosen = jax.random.bernoulli(half_key, self.self_conditioning, (z.shape[0], 1, 1))
        self_condition = jax.lax.stop_gradient(jnp.where(chosen, own, 0.0))

        # 4. Average velocity against its MeanFlow target.
        def u(z_t: Array, t: Array, r: Array) -> Array:
            return average_velocity(
                self.network, params, self.schedule, self.step_form, z_t, t, r, self_condition
            )

        warm = jnp.minimum(1.0, step / max(self.tangent_warmup, 1)) if train else 1.0
        student, target = meanflow.average_velocity_target(u, z_t, t, r, v, warm)
        loss, error = meanflow.adaptive_loss(student, target, self.loss_offset)
        size = z.shape[1] * z.shape[2]
        metrics = {"error": error.mean() / size, "target_norm": jnp.sqrt(jnp.square(target).mean())}
        return loss.mean(), (metrics, context.statistics)

    def group(self, path: tuple[str, ...]) -> str:
        return "all"
