"""Bounds on the likelihood, recovery of masked tokens, and perplexity under a scorer (METHOD sections 1 and 6)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.data.tokenizers import Tokenizer
from diladiff_jax.diffusion import masking
from diladiff_jax.evaluation.measures import intervals
from diladiff_jax.evaluation.measures.intervals import Estimate
from diladiff_jax.nn.transformer import TokenDenoiser
from diladiff_jax.objectives.autoregressive import next_token_nll

Array = jax.Array
LogitsOf = Callable[
    [Any, Array, Array | None], Array
]  # (params, x_t [B, L], condition [B, ...]) -> logits [B, L, V]


def content_mask(tokens: Any, eot_id: int) -> Any:
    """Which positions of `[n, L]` hold text or the end-of-text that closes it, not the fill of end-of-texts after that one."""
    fill = (tokens[:, 1:] == eot_id) & (tokens[:, :-1] == eot_id)
    return jnp.concatenate([jnp.ones_like(fill[:, :1]), ~fill], axis=1)


def bound_and_recovery(
    logits_of: LogitsOf,
    params: Any,
    tokens: np.ndarray,
    key: Array,
    mask_id: int,
    eot_id: int,
    sampleable: np.ndarray,
    *,
    condition: np.ndarray | None = None,
    draws: int,
    batch: int,
    estimator: str = "count",
) -> dict[str, Estimate]:
    """The masked bound on the perplexity per token of text (`bound_ppl`) and the recovery rate, on clean rows `[n, L]`.

    estimator "count": k ~ U{1..L} masked tokens, E_k (L/k) sum_masked -log p (the reported one);
    "ratio": stratified t ~ U(0, 1], E_t (1/t) sum_masked -log p. Recovery, in both, is of masks at t ~ U(0, 1].
    The end-of-texts that fill a row up belong to the row's likelihood, but are neither counted as tokens nor as recovered.
    `logits_of(params, x_t, condition)` is traced, `condition [n, ...]` (latents, say) going with the rows; rows beyond the
    last full batch wrap around and are counted once.

    Raises:
      ValueError: unknown estimator.
    """
    if estimator not in ("count", "ratio"):
        raise ValueError(f"estimator is {estimator!r}; it must be 'count' or 'ratio'")
    allowed = jnp.asarray(sampleable)

    @jax.jit
    def measure(
        params: Any, rows: Array, given: Array | None, key: Array
    ) -> tuple[Array, Array, Array]:
        length, text = rows.shape[1], content_mask(rows, eot_id)

        def draw(key: Array) -> tuple[Array, Array, Array]:
            time_key, mask_key, count_key, subset_key = jax.random.split(key, 4)
            t = masking.stratified_times(time_key, rows.shape[0])
            x_t = masking.mask_tokens(mask_key, rows, t, mask_id)
            nll, right = masking.token_nll(logits_of(params, x_t, given), rows, allowed)
            masked = (x_t == mask_id) & text
            if estimator == "ratio":
                weight = masking.bound_weight(t)
            else:
                count = jax.random.randint(count_key, rows.shape[:1], 1, length + 1)
                x_t = masking.mask_exactly(subset_key, rows, count, mask_id)
                weight = length / count
                nll, _ = masking.token_nll(logits_of(params, x_t, given), rows, allowed)
            nll = jnp.sum(jnp.where(x_t == mask_id, nll, 0.0), axis=-1) * weight
            return nll, (right * masked).sum(axis=-1), masked.sum(axis=-1)

        nll, right, masked = jax.lax.map(draw, jax.random.split(key, draws))
        return nll.mean(axis=0), right.sum(axis=0), masked.sum(axis=0)

    n = len(tokens)
    batch = min(batch, n)
    found = []
    for first in range(0, n, batch):
        rows = np.arange(first, first + batch) % n
        given = None if condition is None else jnp.asarray(condition[rows])
        parts = jax.device_get(
            measure(params, jnp.asarray(tokens[rows]), given, jax.random.fold_in(key, first))
        )
        found.append([part[: min(batch, n - first)] for part in parts])
    nll, right, masked = (
        np.concatenate(parts).astype(np.float64) for parts in zip(*found, strict=True)
    )
    recovery = intervals.bootstrap(
        lambda i: right[i].sum(axis=1) / np.maximum(masked[i].sum(axis=1), 1), n
    )
    length = np.asarray(content_mask(tokens, eot_id)).sum(axis=1).astype(np.float64)
    return {"bound_ppl": intervals.ratio_exp(nll, length), "recovery": recovery}


def retokenize(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Rows `[n, L]` as a scorer should read them: the text of each document encoded anew, an end-of-text where the row had one.

    A model may write a word in pieces that the tokenizer would never choose; what is judged is the text. A row that
    gets longer than L is cut there, a shorter one filled up with end-of-text.
    """
    eot, length = tokenizer.eot_id, tokens.shape[1]
    out = np.full_like(tokens, eot)
    for row, ids in zip(out, tokens, strict=True):
        pieces: list[int] = []
        for run in np.split(
            ids, np.flatnonzero(ids == eot) + 1
        ):  # each run ends in its end-of-text, the last may not
            pieces += tokenizer.encode(tokenizer.decode(run[run != eot])).tolist()
            pieces += [eot] * int((run == eot).sum())
        row[: len(pieces)] = pieces[:length]
    return out


@functools.partial(jax.jit, static_argnums=(0, 3))
def _row_nll(
    network: TokenDenoiser, params: Any, rows: Array, eot_id: int, allowed: Array
) -> Array:
    return (
        next_token_nll(network, params, rows, eot_id, allowed) * content_mask(rows, eot_id)
    ).sum(axis=-1)


def generative_perplexity(
    network: TokenDenoiser,
    params: object,
    tokens: np.ndarray,
    eot_id: int,
    sampleable: np.ndarray,
    *,
    batch: int,
) -> Estimate:
    """Perplexity of rows `[n, L]` under an autoregressive scorer with the same tokenizer.

    exp of the total negative log-likelihood over the total number of tokens, where a run of end-of-texts counts as its
    first. `retokenize` the rows of a model first. Says little without the entropy beside it.
    """
    allowed, n, nll = jnp.asarray(sampleable), len(tokens), []
    batch = min(batch, n)
    for first in range(0, n, batch):
        rows = np.arange(first, first + batch) % n
        nll.append(
            jax.device_get(_row_nll(network, params, jnp.asarray(tokens[rows]), eot_id, allowed))[
                : min(batch, n - first)
            ]
        )
    return intervals.ratio_exp(
        np.concatenate(nll).astype(np.float64),
        np.asarray(content_mask(tokens, eot_id)).sum(axis=1).astype(np.float64),
    )
