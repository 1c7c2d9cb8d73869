"""Times the samplers or the training updates on random weights.

    python launch/benchmark.py --suite=sampling --size=tiny --out=bench.json
    python launch/benchmark.py --suite=training --size=tiny --batch=128 --out=bench.json
    python launch/benchmark.py --suite=sampling --size=small --batch=1,8,32 --out=bench.json
    python launch/benchmark.py --size=paper --decode_steps=64 --timed_steps=4 --out=bench.json
    python launch/benchmark.py --size=paper --batch=8,32 --length=512,1024 --peers --out=bench.json

--suite=sampling decodes the same latents in several ways, in turns within one run:
  naive             all logits in every step, the nucleus by a full sort, the latent read in
                    every step
  bisection         the same with the library's nucleus instead of the sort
  ours              what the library does: only the positions of a step, the latent read once
  approx_skip       as ours with sampling.skip_layers: the second half of the steps skips every
                    second layer, but never the first or the last
  approx_refresh_R  as ours with sampling.refresh_every=R: keys and values of all positions are
                    re-computed only every R steps
All cases attend in the library's own way, so that their ratios show the decoding and not the
attention. In the same turns the benchmark times, for all positions and layers of the backbone, only
the products of its linear maps (linear_maps_seconds) and of attention (attention_products_seconds);
and the latents, those of the student and those of the undistilled prior in --prior_steps steps. A
case that needs more memory than the device has is left out and reported.

--peers times other samplers with a network of the same size, in the same turns on the same device,
each without (and, with _nucleus, with) a nucleus:
  peer_mdlm_torch      the published sampler of masked diffusion models in PyTorch, if that is
                       installed: all logits, and a call only if a token has changed
  peer_autoregressive  one token after another with cached keys and values, in JAX; always all
                       tokens of the text

Networks compute in --dtype. Memory is read from the device's own counters where there are any and
they rise (device_peak_bytes); else it is what the compiler counts.

With --timed_steps=N below --decode_steps=T, only N steps run, on texts of which all but N/T of the
tokens are fixed, so that each step unmasks as many positions as one of T steps does. Times are
scaled by T/N, and each row records N as timed_steps.

--suite=training times, for every stage, the loss, the loss with its gradient, the optimizer, and
the whole update, in turns. fraction_of_matmul_rate counts only the products that the model needs.
All updates of the prior are self-conditioned here; in training half of them are.

A plot is written beside FILE.json as FILE.png.
"""

import os
import pathlib
import tempfile
from typing import Any

import cli
from absl import flags

_SUITE = flags.DEFINE_enum(
    "suite", "sampling", ["sampling", "training"], "What to time: the samplers or the updates."
)
_SIZE = flags.DEFINE_enum(
    "size",
    "tiny",
    ["tiny", "small", "paper"],
    "Size of the networks. tiny: those of configs/tiny.py; small: 6 layers of width 384, texts of"
    " 256 tokens; paper: the published setting.",
)
_BATCH = flags.DEFINE_list(
    "batch",
    ["8"],
    "Texts at a time. --suite=sampling accepts several values, such as 1,8,32.",
)
_LENGTH = flags.DEFINE_list(
    "length",
    None,
    "Tokens per text; default: those of the size. --suite=sampling accepts several values, such as"
    " 256,1024.",
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16"],
    "What the networks compute in; default: float32 on CPUs and bfloat16 on accelerators.",
)
_PEERS = flags.DEFINE_bool(
    "peers", False, "Whether to also time other samplers of the same size. Sampling only."
)
_DECODE_STEPS = flags.DEFINE_integer(
    "decode_steps", 64, "Decoding steps T. Sampling only.", lower_bound=1
)
_LATENT_STEPS = flags.DEFINE_integer(
    "latent_steps", 5, "Steps of the student. Sampling only.", lower_bound=1
)
_PRIOR_STEPS = flags.DEFINE_integer(
    "prior_steps", 200, "Steps of the undistilled prior. Sampling only.", lower_bound=1
)
_TIMED_STEPS = flags.DEFINE_integer(
    "timed_steps",
    None,
    "Steps of the decoders and of the prior that really run; default: all of them. Sampling only.",
    lower_bound=1,
)
_REFRESH_EVERY = flags.DEFINE_integer(
    "refresh_every",
    4,
    "R of the case approx_refresh_R; --timed_steps must be a multiple of it. Sampling only.",
    lower_bound=2,
)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 3, "How often each case runs, in turns; the median is reported.", lower_bound=1
)
_TOP_P = flags.DEFINE_float(
    "top_p",
    0.9,
    "Probability mass of the nucleus to sample from. Sampling only.",
    lower_bound=0,
    upper_bound=1,
)
_OUT = flags.DEFINE_string("out", None, "JSON file to write the results to.", required=True)


def main(argv: list[str]) -> None:
    if _PEERS.value:  # before JAX starts: it would leave PyTorch only a quarter of the memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    from diladiff_jax.benchmark import OutOfMemoryError, report
    from diladiff_jax.console import say
    from diladiff_jax.parallel import available_devices

    path = pathlib.Path(_OUT.value)
    plot_path = path.with_suffix(".png")
    if path.suffix == ".png" or (plot_path.exists() and not path.exists()):
        raise cli.UsageError(
            f"--out: got {path}, whose plot would be written to {plot_path}, expected a name"
            " FILE.json whose FILE.png does not exist. Give another file."
        )
    available_devices()
    # Before hours of measuring.
    cli.check_replaceable("out", path, {"machine", "rows"}, "a result of benchmark.py")
    # An empty persistent cache, so that a cold start finds nothing that earlier runs compiled.
    with tempfile.TemporaryDirectory() as empty:
        jax.config.update("jax_compilation_cache_dir", empty)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        try:
            document = {"sampling": _run_sampling, "training": _run_training}[_SUITE.value]()
        except OutOfMemoryError as error:
            raise cli.UsageError(
                f"--batch: got {','.join(_BATCH.value)}, which needs"
                f" {error.needed_bytes / 2**30:.1f} GiB, expected a batch that fits into memory."
                " Make it smaller."
            ) from None
    cli.write_json("out", path, document)
    report.plot(document["rows"] + document.get("peers", []), plot_path)
    say("\n".join(report.describe(document)))


def _run_sampling() -> dict[str, Any]:
    from diladiff_jax.benchmark import default_dtype, sampling
    from diladiff_jax.console import say

    steps = _DECODE_STEPS.value
    timed = _TIMED_STEPS.value or steps
    if timed > steps:
        raise cli.UsageError(
            f"--timed_steps: got {timed}, expected at most --decode_steps={steps}."
        )
    if timed % _REFRESH_EVERY.value and timed < steps:
        raise cli.UsageError(
            f"--timed_steps: got {timed}, expected a multiple of"
            f" --refresh_every={_REFRESH_EVERY.value}, or all {steps} steps."
        )
    benchmark = sampling.SamplingBenchmark(
        size=_SIZE.value,
        lengths=_numbers("length", _LENGTH.value) if _LENGTH.value else (None,),
        batches=_numbers("batch", _BATCH.value),
        decode_steps=steps,
        timed_steps=timed,
        latent_steps=_LATENT_STEPS.value,
        prior_steps=_PRIOR_STEPS.value,
        timed_prior_steps=min(_TIMED_STEPS.value or _PRIOR_STEPS.value, _PRIOR_STEPS.value),
        refresh_every=_REFRESH_EVERY.value,
        rounds=_ROUNDS.value,
        top_p=_TOP_P.value,
        dtype=_DTYPE.value or default_dtype(),
        peers=_PEERS.value,
    )
    return sampling.run(benchmark, log=say)


def _run_training() -> dict[str, Any]:
    from diladiff_jax.benchmark import default_dtype, training

    if _PEERS.value:
        raise cli.UsageError("--peers: got true, expected false with --suite=training.")
    return training.run(
        training.TrainingBenchmark(
            _SIZE.value,
            _one_number("batch", _BATCH.value),
            _ROUNDS.value,
            _one_number("length", _LENGTH.value) if _LENGTH.value else None,
            _DTYPE.value or default_dtype(),
        )
    )


def _numbers(flag: str, texts: list[str]) -> tuple[int, ...]:
    """The numbers that a flag lists."""
    if not texts or not all(text.strip().isdigit() and int(text) > 0 for text in texts):
        raise cli.UsageError(
            f"--{flag}: got {','.join(texts)!r}, expected whole numbers above 0, such as 8 or 8,32."
        )
    return tuple(int(text) for text in texts)


def _one_number(flag: str, texts: list[str]) -> int:
    """The number that a flag gives."""
    number, *others = _numbers(flag, texts)
    if others:
        raise cli.UsageError(
            f"--{flag}: got {','.join(texts)}, expected one number with --suite=training."
        )
    return number


if __name__ == "__main__":
    cli.run(main, __doc__)
