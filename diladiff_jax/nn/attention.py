"""Softmax attention behind one interface, in the form that suits the platform.

| platform | form | used for |
|---|---|---|
| any | `attend_at_once`, one einsum over all scores | short text, and forward derivatives |
| CPU | `attend_in_blocks` | long text, where the full score matrix does not fit in cache |
| TPU | `attend_splash`, a Pallas kernel | lengths that are multiples of 128 |
| CUDA | `attend_cudnn`, cuDNN's flash attention | 16-bit floats |

On several TPUs, the Pallas kernel also needs an active mesh (`parallel.sharding.on_mesh`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diladiff_jax.nn.placement import placement

# `attend_in_blocks` computes this many scores at once, and is used from this many scores on: a scan
# of small products has its own cost.
BLOCK_SCORES, MANY_SCORES = 2**19, 2**23
# Queries and keys are cut into tiles of the TPU's lanes; large tiles keep its matrix unit busy.
LANES, TILE = 128, 512


def attend(
    q: Float[Array, "B L H K"],
    k: Float[Array, "B M H K"],
    v: Float[Array, "B M H K"],
    *,
    positions: Int[Array, "B L"] | None = None,
    causal: bool = False,
    plain: bool = False,
) -> Float[Array, "B L H*K"]:
    """Softmax attention, in the form that the table above selects.

    Args:
      q: queries.
      k: keys.
      v: values.
      positions: positions of the queries, if not 0 to L - 1. Only read when `causal`.
      causal: whether a query attends only to keys at its own position or before.
      plain: whether to use the einsum on every platform. Code that is differentiated forwards (the
        student's loss) needs it, because the kernels define no forward derivative.

    Returns:
      The attention outputs, with the heads concatenated.
    """
    at_once = functools.partial(attend_at_once, causal=causal)
    elsewhere = causal and positions is not None  # queries not at 0 to L - 1
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(q.shape[1])[None], q.shape[:2])
    if plain:
        return at_once(q, k, v, positions)
    forms: dict[str, Callable[..., Array]] = {}
    if q.shape[0] * q.shape[1] * q.shape[2] * k.shape[1] >= MANY_SCORES:
        forms["cpu"] = functools.partial(attend_in_blocks, causal=causal)
    # XLA cannot partition a kernel: on several devices, the shardings must be known here.
    known = jax.device_count() == 1 or not jax.sharding.get_abstract_mesh().empty
    if not q.shape[1] % LANES and not k.shape[1] % LANES and not elsewhere and known:
        forms["tpu"] = functools.partial(attend_splash, causal=causal)
    # cuDNN's call looks for a GPU while it is traced, so do not even trace it elsewhere.
    if jax.default_backend() == "gpu" and q.dtype.itemsize == 2 and not elsewhere:
        forms["cuda"] = functools.partial(attend_cudnn, causal=causal)
    if not forms:
        return at_once(q, k, v, positions)
    return jax.lax.platform_dependent(q, k, v, positions, default=at_once, **forms)


def attend_at_once(
    q: Float[Array, "B L H K"],
    k: Float[Array, "B M H K"],
    v: Float[Array, "B M H K"],
    positions: Int[Array, "B L"],
    *,
    causal: bool,
) -> Float[Array, "B L H*K"]:
    """Attention that computes all scores at once. Arguments as in `attend`."""
    seen = (
        positions[:, None, :, None] >= jnp.arange(k.shape[1])[None, None, None, :]
        if causal
        else None
    )
    out = jax.nn.dot_product_attention(q, k, v, mask=seen, implementation="xla")
    return out.reshape(*out.shape[:2], -1)


def attend_in_blocks(
    q: Float[Array, "B L H K"],
    k: Float[Array, "B M H K"],
    v: Float[Array, "B M H K"],
    positions: Int[Array, "B L"],
    *,
    causal: bool,
) -> Float[Array, "B L H*K"]:
    """Attention over one head and one block of queries at a time. Arguments as in `attend`.

    The scores of a block stay in cache. The batch axis is not cut, so that it can be sharded. The
    gradient recomputes the scores of each head instead of keeping them.
    """
    batch, length, heads, width = q.shape
    size = max(1, min(length, BLOCK_SCORES // (batch * k.shape[1])))
    count = -(-length // size)

    def blocks(x: Array) -> Array:  # [B, L, ...] -> [count, B, size, ...], zero-padded
        x = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)

    place = blocks(positions)

    @jax.checkpoint
    def head(qkv: tuple[Array, Array, Array]) -> Array:
        q, k, v = qkv

        def block(inputs: tuple[Array, Array]) -> Array:
            q, place = inputs
            scores = jnp.einsum(
                "blk,bmk->blm",
                q * jnp.asarray(width**-0.5, q.dtype),
                k,
                preferred_element_type=jnp.float32,
            )
            if causal:
                scores = jnp.where(
                    place[:, :, None] >= jnp.arange(k.shape[1])[None, None, :], scores, -jnp.inf
                )
            weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
            mixed = jnp.einsum(
                "blm,bmk->blk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
            )
            return (mixed / jnp.sum(weights, axis=-1, keepdims=True)).astype(v.dtype)

        return jax.lax.map(block, (blocks(q), place))

    out_HxCxBxSxK = jax.lax.map(head, tuple(jnp.moveaxis(x, 2, 0) for x in (q, k, v)))
    out = out_HxCxBxSxK.transpose(2, 1, 3, 0, 4).reshape(batch, count * size, heads * width)
    return out[:, :length]


def attend_cudnn(
    q: Float[Array, "B L H K"],
    k: Float[Array, "B M H K"],
    v: Float[Array, "B M H K"],
    positions: Int[Array, "B L"],
    *,
    causal: bool,
) -> Float[Array, "B L H*K"]:
    """cuDNN's fused attention, for queries at positions 0 to L - 1. Arguments as in `attend`."""
    out = jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    return out.reshape(*out.shape[:2], -1)


def attend_splash(
    q: Float[Array, "B L H K"],
    k: Float[Array, "B M H K"],
    v: Float[Array, "B M H K"],
    positions: Int[Array, "B L"],
    *,
    causal: bool,
    interpret: bool = False,
) -> Float[Array, "B L H*K"]:
    """Pallas splash attention, for queries at positions 0 to L - 1. Arguments as in `attend`.

    Lengths must be multiples of 128. XLA cannot partition a kernel, so under a mesh each device
    runs it on its own examples and heads. `interpret` runs it on any platform, slowly.
    """
    # Imported here because importing Pallas is slow and most runs do not need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    shape = (q.shape[1], k.shape[1])
    mask = (
        splash_attention_mask.CausalMask(shape) if causal else splash_attention_mask.FullMask(shape)
    )
    rows, columns = (
        max(size for size in range(LANES, min(TILE, n) + 1, LANES) if n % size == 0) for n in shape
    )
    tiles = splash_attention_kernel.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_q_dq=rows,
        block_kv_dq=columns,
    )

    def local(q: Array, k: Array, v: Array) -> Array:
        heads = q.shape[2]
        kernel = splash_attention_kernel.make_splash_mha(
            splash_attention_mask.MultiHeadMask([mask] * heads),
            block_sizes=tiles,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        q, k, v = (x.swapaxes(1, 2) for x in (q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), k, v))
        return cast(Array, jax.vmap(kernel)(q, k, v)).swapaxes(1, 2)

    found = placement(q.shape, ("batch", None, "heads", None))
    if found is not None:
        mesh, spec = found
        local = jax.shard_map(
            local, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False
        )
    out = local(q, k, v)
    return out.reshape(*out.shape[:2], -1)
