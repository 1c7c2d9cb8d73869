"""The programs of the sampling benchmark and their inputs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.benchmark import decoding_flops, naive_sampler
from diladiff_jax.benchmark.sizes import experiment_config
from diladiff_jax.benchmark.timing import (
    Program,
    compile_program,
    device_peak,
    random_parameters,
    time_run,
)
from diladiff_jax.diffusion.gaussian import ScheduleOptions, make_schedule
from diladiff_jax.diffusion.masking import AbsorbingProcess
from diladiff_jax.jax_settings import random_key
from diladiff_jax.nn.networks import NetworkOptions, build_networks
from diladiff_jax.sampling.latent_sources import PriorLatents, StudentLatents
from diladiff_jax.sampling.options import SamplingOptions
from diladiff_jax.sampling.sampler import Controls, Sampler


@dataclasses.dataclass(frozen=True)
class SamplingBenchmark:
    """What to time.

    Attributes:
      size: one of `SIZES`.
      lengths: tokens per text; each gets its own rows; None is that of the size.
      batches: numbers of texts at a time; each gets its own rows.
      decode_steps: decoding steps T.
      timed_steps: steps that really run, at most T. Fewer than T run on texts of which all but
        `timed_steps / T` of the tokens are fixed, so that each step unmasks as many positions as
        one of T steps does; times are scaled by `T / timed_steps`.
      latent_steps: steps of the student.
      prior_steps: steps of the undistilled prior.
      timed_prior_steps: steps of the prior that really run, at most `prior_steps`.
      refresh_every: R of `approx_refresh_R`.
      rounds: how often each case runs, in turns.
      top_p: mass of the nucleus.
      dtype: what networks compute in, "float32" or "bfloat16".
      peers: whether to time `peers` too.
    """

    size: str
    lengths: tuple[int | None, ...]
    batches: tuple[int, ...]
    decode_steps: int
    timed_steps: int
    latent_steps: int
    prior_steps: int
    timed_prior_steps: int
    refresh_every: int
    rounds: int
    top_p: float
    dtype: str = "float32"
    peers: bool = False


@dataclasses.dataclass(frozen=True)
class Workload:
    """The inputs of all programs at one batch."""

    config: Any  # a ConfigDict
    sampler: Sampler
    params: dict[str, Any]
    keys: jax.Array
    prompt: jax.Array
    controls: Controls
    prior_controls: Controls

    @property
    def latents(self) -> jax.Array:
        """Latents to compile the decoders with, `[B, N, D_lat]`."""
        return jnp.zeros((len(self.prompt), *self.sampler.networks.latent_shape))

    @property
    def masked(self) -> np.ndarray:
        """Which positions are to be filled, bool `[B, L]`."""
        return np.asarray(self.sampler.process.is_open(self.prompt))


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs at one batch.

    Attributes:
      latents: the samplers of the latent, "student" and "prior".
      linear_maps: times the products of the backbone's linear maps once, in seconds.
      attention_products: times the products of all layers' attention once, in seconds.
      decode: by case, the decoders.
      device_peaks: by case, the memory of the decoder by the device's own counter, if there is one.
    """

    latents: dict[str, Program]
    linear_maps: Callable[[], float]
    attention_products: Callable[[], float]
    decode: dict[str, Program]
    device_peaks: dict[str, int | None] = dataclasses.field(default_factory=dict)

    @property
    def cases(self) -> list[str]:
        """The cases that fit into memory; none if the library's own does not."""
        if not self.decode["ours"].fits:
            return []
        return [case for case, program in self.decode.items() if program.fits]


def build_workload(benchmark: SamplingBenchmark, batch: int, length: int) -> Workload:
    """Builds the networks, their random weights and the inputs for `batch` texts of `length`."""
    config = experiment_config(benchmark.size, length=length, dtype=benchmark.dtype)
    vocab = config.tokenizer.vocab_size
    mask_id = vocab - 1
    networks = build_networks(NetworkOptions.of(config.to_dict()), length, vocab)
    schedule = make_schedule(ScheduleOptions.of(config.diffusion))
    process = AbsorbingProcess(mask_id, np.arange(vocab) < mask_id)
    sampler = Sampler(networks, schedule, process)

    masked_fraction = benchmark.timed_steps / benchmark.decode_steps
    fixed = np.random.default_rng(0).random((batch, length)) >= masked_fraction
    ids = np.random.default_rng(1).integers(0, mask_id, (batch, length))
    prompt = jnp.asarray(np.where(fixed, ids, mask_id), jnp.int32)
    z, t = jnp.zeros((batch, *networks.latent_shape)), jnp.zeros((batch,))
    student = random_parameters(networks.student, z, t, z, t)
    params = {
        "decoder": random_parameters(networks.decoder, prompt, z),
        "student": student,
        # The same network without the embedding of the interval.
        "teacher": {name: tree for name, tree in student.items() if name != "interval_time"},
    }
    controls = Controls(
        decode_steps=jnp.int32(benchmark.timed_steps),
        latent_steps=jnp.int32(benchmark.latent_steps),
        temperature=jnp.float32(1.0),
        top_p=jnp.float32(benchmark.top_p),
        gamma=jnp.float32(0.8),
        threshold=jnp.float32(0.9),
    )
    prior_controls = controls._replace(latent_steps=jnp.int32(benchmark.timed_prior_steps))
    keys = jax.random.split(random_key(1), batch)
    return Workload(config, sampler, params, keys, prompt, controls, prior_controls)


def _decoders(benchmark: SamplingBenchmark, workload: Workload) -> dict[str, Callable[..., Any]]:
    """By case, the function `(params, keys, prompt, latents, controls) -> tokens`."""
    sampler = workload.sampler
    skip = decoding_flops.skipped_layers(workload.config.backbone.num_layers)
    naive = functools.partial(
        naive_sampler.naive_decode,
        sampler.networks,
        process=sampler.process,
    )

    def decode(sampler: Sampler, *arguments: Any) -> jax.Array:
        return sampler.decode(*arguments).tokens

    def with_options(**changes: Any) -> Callable[..., Any]:
        options = dataclasses.replace(SamplingOptions(), **changes)
        return functools.partial(decode, dataclasses.replace(sampler, options=options))

    refresh_every = benchmark.refresh_every
    return {
        "naive": functools.partial(naive, sort=True),
        "bisection": functools.partial(naive, sort=False),
        "ours": functools.partial(decode, sampler),
        "approx_skip": with_options(skip_layers=skip),
        f"approx_refresh_{refresh_every}": with_options(refresh_every=refresh_every),
    }


def compile_programs(benchmark: SamplingBenchmark, workload: Workload) -> Programs:
    """Compiles all programs of a workload."""
    w, backbone = workload, workload.config.backbone
    (batch, length), decoder_params = w.prompt.shape, w.params["decoder"]["backbone"]
    latents = {
        "student": compile_program(
            functools.partial(StudentLatents(), w.sampler), w.params, w.keys, w.controls
        ),
        "prior": compile_program(
            functools.partial(PriorLatents(), w.sampler),
            w.params,
            w.keys,
            w.prior_controls,
            with_cached=False,
        ),
    }
    decoder_params = jax.tree.map(lambda x: x.astype(benchmark.dtype), decoder_params)
    h = jnp.ones((batch * length, backbone.width), benchmark.dtype)
    maps = compile_program(decoding_flops.linear_maps, decoder_params, h, with_cached=False)
    shape = (batch, length, backbone.heads, backbone.width // backbone.heads)
    qkv = (jnp.ones(shape, benchmark.dtype),) * 3
    attention = compile_program(decoding_flops.attention_products, *qkv, with_cached=False)
    decode = {
        case: compile_program(function, w.params, w.keys, w.prompt, w.latents, w.controls)
        for case, function in _decoders(benchmark, w).items()
    }
    return Programs(
        latents=latents,
        linear_maps=lambda: time_run(maps.run, decoder_params, h)[0],
        attention_products=lambda: backbone.num_layers * time_run(attention.run, *qkv)[0],
        decode=decode,
        device_peaks=_device_peaks(decode, w),
    )


def _device_peaks(decode: dict[str, Program], workload: Workload) -> dict[str, int | None]:
    """What the device counts for each decoder that fits, the smallest first."""
    w = workload
    arguments = w.params, w.keys, w.prompt, w.latents, w.controls
    fitting = [case for case, program in decode.items() if program.fits]
    return {
        case: device_peak(functools.partial(decode[case].run, *arguments))
        for case in sorted(fitting, key=lambda case: decode[case].temporary_bytes)
    }
