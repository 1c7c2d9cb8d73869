"""The matrix products of decoding, for launch/benchmark.py: how many FLOPs each way of it takes by the networks' formulas, and the backbone's alone, to be timed."""

from __future__ import annotations

from typing import Any


def busy(positions: int, steps: int, every: int = 1) -> float:
    """In how many of `steps`, or of their groups of `every`, something is expected to be unmasked, each position in one of them at random."""
    groups = -(-steps // every)
    return groups * (1 - (1 - 1 / groups) ** positions)


def decoding_flops(case: str, c: Any, vocab: int, batch: int, steps: int, refresh: int) -> float:
    """Matrix-product FLOPs that `steps` decoding steps are expected to take (multiply and add count as two), by the network's formulas."""
    d, layers, length, n = (
        c.backbone.width,
        c.backbone.num_layers,
        c.data.length,
        c.encoder.num_latents,
    )
    rows, crosses = batch * length, len(set(c.decoder.cross_layers))
    if case not in ("naive", "bisection"):
        anew, steps = busy(rows, steps, refresh), busy(rows, steps)  # the others are left out
    needed = rows / steps
    mlp = 2 * c.backbone.mlp_ratio * d * d
    block = 2 * rows * (4 * d * d + mlp) + 4 * rows * length * d
    cross = crosses * (2 * rows * 4 * d * d + 4 * rows * n * d)
    reading = crosses * 4 * batch * n * c.encoder.latent_dim * d
    if case in ("naive", "bisection"):
        return steps * (layers * block + cross + reading + 2 * rows * d * vocab)
    at_needed = (
        2 * needed * (2 * d * d + mlp) + 4 * needed * length * d
    )  # of a layer whose keys and values are there
    whole = (
        (layers - 1) * block + cross + 2 * rows * 2 * d * d
    )  # all layers but the last, and its keys and values
    if case in ("ours", "approx_skip"):
        late = steps / 2 if case == "approx_skip" else 0
        return (
            steps * (whole + at_needed + 2 * needed * d * vocab)
            + reading
            - late * len(skipped(layers)) * block
        )
    some = layers * at_needed + cross * needed / rows
    changed = (
        (layers - 1) * at_needed + cross * needed / rows + layers * 2 * needed * 2 * d * d
    )  # of the last layer, keys and values alone
    return (
        anew * whole + (steps - anew) * changed + steps * (some + 2 * needed * d * vocab) + reading
    )


def skipped(layers: int) -> tuple[int, ...]:
    """Every second layer between the first and the last."""
    return tuple(range(1, layers - 1, 2))


def linear_maps(params: Any, h: Any) -> Any:
    """The products of a backbone's linear maps, and nothing else but sums: `h [B L, D]` through queries, keys, values, output and MLP of every block."""
    for name in sorted(name for name in params if name.startswith("block_")):
        attention, mlp = params[name]["attention"], params[name]["mlp"]
        h = (
            sum(h @ attention[part]["linear"]["kernel"] for part in ("query", "key", "value"))
            @ attention["out"]["kernel"]
        )
        h = (h @ mlp["up"]["kernel"]) @ mlp["down"]["kernel"]
    return h


def attention_products(q: Any, k: Any, v: Any) -> Any:
    """The two products of one layer's attention, `[B, L, H, K]` each, cut as the library cuts long text on CPUs, and no softmax between.

    Times the layers and with the linear maps, that is the backbone's products for all positions. A step of ours may take less: of the last
    layer it makes only keys and values everywhere; it may take more for all that is no product, the latent's reading and the vocabulary.
    """
    import jax
    import jax.numpy as jnp

    from diladiff_jax.nn.attention import BLOCK_SCORES, MANY_SCORES

    batch, length, heads, width = q.shape
    if batch * heads * length * length < MANY_SCORES:
        return jnp.einsum("bhlm,bmhk->blhk", jnp.einsum("blhk,bmhk->bhlm", q, k), v)
    size = max(1, min(length, BLOCK_SCORES // (batch * length)))
    while length % size:
        size -= 1

    def head(qkv: Any) -> Any:
        q, k, v = qkv
        return jax.lax.map(
            lambda q: jnp.einsum("blm,bmk->blk", jnp.einsum("blk,bmk->blm", q, k), v),
            jnp.moveaxis(q.reshape(batch, -1, size, width), 1, 0),
        )

    return jax.lax.map(head, tuple(jnp.moveaxis(x, 2, 0) for x in (q, k, v)))
