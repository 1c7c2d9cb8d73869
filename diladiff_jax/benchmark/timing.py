"""Compiling and timing programs, and the random weights to run them on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diladiff_jax.jax_settings import random_key
from diladiff_jax.parallel import sharding


class OutOfMemoryError(RuntimeError):
    """No case of the benchmark fits into this machine's memory.

    Attributes:
      needed_bytes: what the library's own sampler needs at the smallest batch.
    """

    def __init__(self, needed_bytes: int) -> None:
        super().__init__(f"the benchmark needs {needed_bytes / 2**30:.1f} GiB of memory")
        self.needed_bytes = needed_bytes


class Program(NamedTuple):
    """A compiled program and what it took to compile.

    Attributes:
      run: the compiled function.
      cold_seconds: time to trace, lower and compile with an empty persistent cache.
      cached_seconds: the same time when the compiled program comes from the persistent cache.
      tracing_seconds: time to trace and lower, which no cache saves.
      temporary_bytes: memory of its temporaries.
      held_bytes: memory of its temporaries, arguments and results.
    """

    run: Callable[..., Any]
    cold_seconds: float
    cached_seconds: float
    tracing_seconds: float
    temporary_bytes: int
    held_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the device can hold it; True if the device does not report its memory."""
        available = sharding.device_memory()
        return available is None or self.held_bytes <= available


def compile_program(
    function: Callable[..., Any], *arguments: Any, with_cached: bool = True
) -> Program:
    """Compiles a function, with an empty persistent cache if the caller has set up one.

    Args:
      function: the function to jit.
      *arguments: what it will be called with.
      with_cached: whether to compile a second time, to measure a start from the cache.
    """
    seconds, tracing = [], []
    for _ in range(2 if with_cached else 1):
        jax.clear_caches()
        start = time.perf_counter()
        lowered = jax.jit(function).lower(*arguments)
        tracing.append(time.perf_counter() - start)
        program = lowered.compile()
        seconds.append(time.perf_counter() - start)
    memory = program.memory_analysis()
    temporary = held = 0
    if memory is not None:
        temporary = int(memory.temp_size_in_bytes)
        held = temporary + int(memory.argument_size_in_bytes + memory.output_size_in_bytes)
    return Program(program, seconds[0], seconds[-1], min(tracing), temporary, held)


def time_run(program: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Runs a program once. Returns its wall-clock seconds and its result."""
    start = time.perf_counter()
    result = jax.block_until_ready(program(*arguments))
    return time.perf_counter() - start, result


def default_dtype() -> str:
    """What networks compute in by default: bfloat16, but float32 on CPUs, where that is slow."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def device_peak(run: Callable[[], Any]) -> int | None:
    """Runs a program and reads how much memory it needs from the device's own counter, in bytes.

    The counter keeps its highest value since the process started, so run small programs first.

    Returns:
      The memory beyond what was in use before; None without running anything if the device does
      not count, and None if the counter did not rise, because an earlier program needed more.
    """
    device = jax.local_devices()[0]
    before = device.memory_stats() or {}
    if "peak_bytes_in_use" not in before:
        return None
    jax.block_until_ready(run())
    peak = (device.memory_stats() or before)["peak_bytes_in_use"]
    return peak - before["bytes_in_use"] if peak > before["peak_bytes_in_use"] else None


def matmul_rate(dtype: str = "float32", rounds: int = 5) -> float:
    """The best rate of a product of two square matrices on this device, in FLOP/s.

    They are of 2,048 rows on CPUs, and of 8,192 elsewhere.
    """
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: x @ x).lower(x).compile()
    return 2 * size**3 / min(time_run(product, x)[0] for _ in range(rounds))


def random_parameters(module: nn.Module, *inputs: Any) -> Any:
    """Samples weights of trained magnitude: kernels scaled by fan-in, gains one, biases zero.

    A freshly initialized network has zero matrices, which would make its logits constant.
    """
    shapes = nn.unbox(jax.eval_shape(module.init, random_key(0), *inputs)["params"])
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    keys = jax.random.split(random_key(0), len(leaves))

    def sample(key: Any, path: Any, leaf: Any) -> jax.Array:
        kind = path[-1].key
        if kind in ("scale", "bias"):
            return jnp.full(leaf.shape, float(kind == "scale"))
        std = leaf.shape[0] ** -0.5 if kind == "kernel" else 0.02
        return jax.random.normal(key, leaf.shape) * std

    return tree.unflatten(
        [sample(key, path, leaf) for key, (path, leaf) in zip(keys, leaves, strict=True)]
    )
