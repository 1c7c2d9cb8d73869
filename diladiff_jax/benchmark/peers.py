"""Other ways of writing the same text with a network of the same size, for comparison.

- `peer_mdlm_torch`, `peer_mdlm_torch_nucleus`: the published sampler of masked diffusion models in
  PyTorch (`torch_mdlm`), with and without a nucleus.
- `peer_autoregressive`, `peer_autoregressive_nucleus`: the backbone run causally with cached keys
  and values, one token after another, in one JAX program.

None has a latent. They run on the same device, in turns with the library's samplers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.benchmark.sampling_programs import SamplingBenchmark, Workload
from diladiff_jax.benchmark.timing import compile_program, device_peak, time_run
from diladiff_jax.benchmark.torch_mdlm import Size, TorchMDLM, import_torch
from diladiff_jax.parallel import sharding
from diladiff_jax.sampling import AutoregressiveSampler

PREFIX = "peer_"


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way of sampling.

    Attributes:
      case: its name.
      framework: "JAX" or "PyTorch".
      seconds: samples all texts once and returns the seconds, scaled to all steps.
      temporary_bytes: memory of its temporaries by the compiler's count, if there is one.
      device_peak_bytes: the same by the device's own counters, if there are any.
    """

    case: str
    framework: str
    seconds: Callable[[], float]
    temporary_bytes: int | None
    device_peak_bytes: int | None


def build_peers(
    benchmark: SamplingBenchmark, workload: Workload
) -> tuple[list[Peer], list[dict[str, Any]]]:
    """Builds the peers at one batch and length, and runs each of them once.

    Returns:
      The peers, and `{"case", "reason"}` for each that is left out.
    """
    peers, left_out = _autoregressive(benchmark, workload)
    torch_peers, torch_left_out = _torch_mdlm(benchmark, workload)
    return peers + torch_peers, left_out + torch_left_out


def _nuclei(benchmark: SamplingBenchmark) -> dict[str, float | None]:
    """By suffix of the case, the mass of the nucleus."""
    return {"": None, "_nucleus": benchmark.top_p}


def _autoregressive(
    benchmark: SamplingBenchmark, workload: Workload
) -> tuple[list[Peer], list[dict[str, Any]]]:
    sampler = workload.sampler
    network = sampler.networks.denoiser.clone(causal=True, name=None)
    program = AutoregressiveSampler(network, sampler.process, start_id=0)
    params = workload.params["decoder"]["backbone"]
    blank = jnp.asarray(sampler.process.initial(workload.prompt.shape), jnp.int32)
    controls = jnp.float32(1), jnp.float32(1)
    compiled = compile_program(program, params, workload.keys, blank, *controls, with_cached=False)
    names = {f"{PREFIX}autoregressive{suffix}": p for suffix, p in _nuclei(benchmark).items()}
    if not compiled.fits:
        reason = f"it needs {compiled.held_bytes / 2**30:.1f} GiB, more memory than there is"
        return [], [{"case": case, "reason": reason} for case in names]

    def run(top_p: float | None) -> float:
        mass = jnp.float32(1 if top_p is None else top_p)
        return time_run(compiled.run, params, workload.keys, blank, controls[0], mass)[0]

    peak = device_peak(lambda: run(None))  # first of all programs, because it is the smallest
    return [
        Peer(case, "JAX", lambda p=p: run(p), compiled.temporary_bytes, peak)
        for case, p in names.items()
    ], []


def _torch_mdlm(
    benchmark: SamplingBenchmark, workload: Workload
) -> tuple[list[Peer], list[dict[str, Any]]]:
    names = {f"{PREFIX}mdlm_torch{suffix}": p for suffix, p in _nuclei(benchmark).items()}
    torch = import_torch()
    reason = _why_unusable(torch)
    if torch is None or reason:
        return [], [{"case": case, "reason": reason} for case in names]
    batch, length = workload.prompt.shape
    backbone, vocab = workload.config.backbone, workload.config.tokenizer.vocab_size
    size = Size(
        vocab, length, backbone.width, backbone.num_layers, backbone.heads, backbone.mlp_ratio
    )
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    model = TorchMDLM(torch, size, device, benchmark.dtype)
    prompt, scale = np.asarray(workload.prompt), benchmark.decode_steps / benchmark.timed_steps
    tuned, peers, left_out = False, [], []
    for case, top_p in names.items():
        arguments = prompt, benchmark.timed_steps, vocab - 1, top_p
        needed, available = (
            model.needed_bytes(batch, nucleus=top_p is not None),
            sharding.device_memory(),
        )
        try:
            if available is not None and needed > available:
                raise MemoryError
            if not tuned:
                model.choose_threads(prompt, vocab - 1)
                tuned = True
            peak = model.peak_bytes(*arguments)
        except (MemoryError, torch.OutOfMemoryError):
            reason = f"it needs about {needed / 2**30:.0f} GiB, more memory than there is"
            left_out.append({"case": case, "reason": reason})
        else:
            peers.append(Peer(case, "PyTorch", _timed(model, arguments, scale), None, peak))
        model.release()
    return peers, left_out


def _timed(model: TorchMDLM, arguments: tuple[Any, ...], scale: float) -> Callable[[], float]:
    def seconds() -> float:
        found = model.time(*arguments)
        model.release()
        return scale * found

    return seconds


def _why_unusable(torch: Any) -> str:
    """Why PyTorch cannot run on JAX's device; empty if it can."""
    if torch is None:
        return "PyTorch is not installed"
    backend = jax.default_backend()
    if backend == "cpu" or (backend == "gpu" and torch.cuda.is_available()):
        return ""
    return f"PyTorch does not see this {backend.upper()}"
