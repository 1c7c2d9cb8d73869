"""Likelihood bounds, recovery of masked tokens, and perplexity under the trained scorer.

`docs/method.md`, sections Masked diffusion and Measures, has the equations.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.data.tokenizers import Tokenizer
from diladiff_jax.diffusion import masking
from diladiff_jax.evaluation.measures import intervals
from diladiff_jax.evaluation.measures.batches import map_batches
from diladiff_jax.evaluation.measures.intervals import Estimate
from diladiff_jax.nn.transformer import TokenDenoiser
from diladiff_jax.objectives.autoregressive import content_mask, next_token_nll

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A network that predicts masked tokens, and what it is conditioned on.

    Attributes:
      logits: `(params, x_t [B, L], condition [B, ...] or None) -> logits [B, L, V]`; traced.
      params: its parameters.
      condition: one for each row that is measured, `[n, ...]`, for example latents; or None.
    """

    logits: Callable[[Any, Array, Array | None], Array]
    params: Any
    condition: np.ndarray | None = None

    def condition_of(self, rows: np.ndarray) -> Array | None:
        """The condition of some rows, given by their indices."""
        return None if self.condition is None else jnp.asarray(self.condition[rows])


def content_positions(tokens: np.ndarray, eot_id: int) -> np.ndarray:
    """`content_mask` of NumPy rows `[n, L]`, bool `[n, L]`."""
    return np.asarray(content_mask(jnp.asarray(tokens), eot_id))


def content_length(tokens: np.ndarray, eot_id: int) -> np.ndarray:
    """Number of content tokens of each row of `[n, L]`, float64 `[n]`."""
    return content_positions(tokens, eot_id).sum(axis=1).astype(np.float64)


def bound_and_recovery(
    denoiser: Denoiser,
    tokens: np.ndarray,
    key: Array,
    tokenizer: Tokenizer,
    *,
    draws: int,
    batch: int,
    estimator: str = "count",
) -> dict[str, Estimate]:
    """The masked bound on the perplexity, and the recovery rate, of clean rows `[n, L]`.

    The padding at the end of a row belongs to its likelihood, but counts neither as tokens nor as
    recovered tokens. Recovery is over masking ratios t ~ U(0, 1] with both estimators.

    Args:
      denoiser: the network, with a condition for each row if it takes one.
      tokens: int32 `[n, L]`.
      key: a JAX key.
      tokenizer: gives the mask's and the end-of-text's ids, and the ids that can be sampled.
      draws: random masks per row.
      batch: rows at a time.
      estimator: of the bound. "count" (the one reported) draws k ~ U{1..L} masked tokens and is
        E_k (L/k) sum_masked -log p. "ratio" draws stratified t ~ U(0, 1] and is
        E_t (1/t) sum_masked -log p.

    Returns:
      `bound_ppl`, per token of content, and `recovery`.

    Raises:
      ValueError: `estimator` is unknown.
    """
    if estimator not in ("count", "ratio"):
        raise ValueError(f"estimator: got {estimator!r}, expected 'count' or 'ratio'.")
    measure = _masked_draws(denoiser, tokenizer, draws, estimator)

    def measure_batch(rows: np.ndarray) -> tuple[Array, Array, Array]:
        batch_key, given = jax.random.fold_in(key, int(rows[0])), denoiser.condition_of(rows)
        return measure(denoiser.params, jnp.asarray(tokens[rows]), given, batch_key)

    nll, right, masked = (
        np.asarray(part, np.float64) for part in map_batches(measure_batch, len(tokens), batch)
    )
    return {
        "bound_ppl": intervals.ratio_exp(nll, content_length(tokens, tokenizer.eot_id)),
        "recovery": intervals.ratio(right, masked),
    }


def _masked_draws(
    denoiser: Denoiser, tokenizer: Tokenizer, draws: int, estimator: str
) -> Callable[[Any, Array, Array | None, Array], tuple[Array, Array, Array]]:
    """A jitted `(params, rows, condition, key) -> ` bound in nats, recovered and masked tokens."""
    mask_id, allowed = tokenizer.mask_id, jnp.asarray(tokenizer.sampleable)

    def measure(
        params: Any, rows: Array, given: Array | None, key: Array
    ) -> tuple[Array, Array, Array]:
        length, content = rows.shape[1], content_mask(rows, tokenizer.eot_id)

        def draw(key: Array) -> tuple[Array, Array, Array]:
            time_key, mask_key, count_key, subset_key = jax.random.split(key, 4)
            t = masking.stratified_times(time_key, rows.shape[0])
            x_t = masking.mask_tokens(mask_key, rows, t, mask_id)
            nll, right = masking.token_nll(denoiser.logits(params, x_t, given), rows, allowed)
            masked = (x_t == mask_id) & content
            if estimator == "ratio":
                weight = masking.bound_weight(t)
            else:
                count = jax.random.randint(count_key, rows.shape[:1], 1, length + 1, jnp.int32)
                x_t = masking.mask_exactly(subset_key, rows, count, mask_id)
                weight = length / count
                nll, _ = masking.token_nll(denoiser.logits(params, x_t, given), rows, allowed)
            nll = jnp.sum(jnp.where(x_t == mask_id, nll, 0.0), axis=-1) * weight
            return nll, (right * masked).sum(axis=-1), masked.sum(axis=-1)

        nll, right, masked = jax.lax.map(draw, jax.random.split(key, draws))
        return nll.mean(axis=0), right.sum(axis=0), masked.sum(axis=0)

    return jax.jit(measure)


def retokenize(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Rows `[n, L]` with the text of each document encoded again, as a scorer should read them.

    A model may spell a word in pieces that the tokenizer would never choose, and what should be
    judged is the text. End-of-text tokens stay where the row had them. A row that gets longer
    than L is cut; a shorter one is padded with end-of-text.
    """
    eot, length = tokenizer.eot_id, tokens.shape[1]
    out = np.full_like(tokens, eot)
    for row, ids in zip(out, tokens, strict=True):
        pieces: list[int] = []
        # Each run ends in its end-of-text; the last one may have none.
        for run in np.split(ids, np.flatnonzero(ids == eot) + 1):
            pieces += tokenizer.encode(tokenizer.decode(run[run != eot])).tolist()
            pieces += [eot] * int((run == eot).sum())
        row[: len(pieces)] = pieces[:length]
    return out


@functools.partial(jax.jit, static_argnums=(0, 3))
def _row_nll(
    network: TokenDenoiser, params: Any, rows: Array, eot_id: int, allowed: Array
) -> Array:
    nll = next_token_nll(network, params, rows, eot_id, allowed)
    return (nll * content_mask(rows, eot_id)).sum(axis=-1)


def generative_perplexity(
    network: TokenDenoiser,
    params: object,
    tokens: np.ndarray,
    tokenizer: Tokenizer,
    *,
    batch: int,
) -> Estimate:
    """Perplexity of rows `[n, L]` under an autoregressive scorer with the same tokenizer.

    exp of the total negative log-likelihood over the total number of content tokens. Apply
    `retokenize` to a model's rows first. Generative perplexity means little without the entropy
    beside it: repetitive text has a low one.
    """
    eot_id, allowed = tokenizer.eot_id, jnp.asarray(tokenizer.sampleable)
    nll = map_batches(
        lambda rows: _row_nll(network, params, jnp.asarray(tokens[rows]), eot_id, allowed),
        len(tokens),
        batch,
    )
    return intervals.ratio_exp(np.asarray(nll, np.float64), content_length(tokens, eot_id))
