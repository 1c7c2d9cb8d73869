"""How alike are texts decoded from one latent, and from two: figures 3 and 4 of the paper."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diladiff_jax.evaluation.figures import Figure, figure, linear, log, series
from diladiff_jax.evaluation.measures import intervals
from diladiff_jax.evaluation.measures.intervals import Estimate
from diladiff_jax.evaluation.measures.likelihood import content_positions
from diladiff_jax.model import Model


def equal_positions(a: np.ndarray, b: np.ndarray, eot_id: int) -> np.ndarray:
    """Share of positions at which rows `a [n, L]` and `b [n, L]` have the same id, `[n]`.

    Only positions with content in either row count.
    """
    either = content_positions(a, eot_id) | content_positions(b, eot_id)
    return ((a == b) & either).sum(axis=1) / np.maximum(either.sum(axis=1), 1)


def jaccard(a: np.ndarray, b: np.ndarray, n: int, eot_id: int) -> np.ndarray:
    """Jaccard overlap |A & B| / |A | B| of the n-gram sets of rows `[m, L]` and `[m, L]`, `[m]`.

    n-grams are over the row without end-of-text. The overlap is 1 if both sets are empty.
    """

    def grams(row: np.ndarray) -> set[tuple[int, ...]]:
        row = row[row != eot_id]
        return {tuple(row[i : i + n].tolist()) for i in range(len(row) - n + 1)}

    pairs = [(grams(x), grams(y)) for x, y in zip(a, b, strict=True)]
    return np.array([len(x & y) / len(x | y) if x | y else 1.0 for x, y in pairs])


def latent_similarity(
    model: Model, latents: np.ndarray, decode_steps: Sequence[int], *, seed: int = 0
) -> list[Figure]:
    """Figures 3 and 4: similarity of texts decoded from the same latent, and from different ones.

    Each latent is decoded twice with different keys ("one latent"), and the first texts of
    latents 2 i and 2 i + 1 are compared ("two latents").

    Args:
      model: the workdir's models.
      latents: of held-out rows, `[n, N, D_lat]`.
      decode_steps: numbers of decoding steps; figure 4 is at the last one.
      seed: of the decoding.
    """
    eot = model.tokenizer.eot_id
    even = len(latents) // 2 * 2
    alike: dict[str, list[Estimate]] = {"one latent": [], "two latents": []}
    first = second = np.empty(0)
    for steps in decode_steps:
        first, second = (
            model.decode(seed + i, latents[:even], decode_steps=steps).tokens for i in (0, 1)
        )
        alike["one latent"].append(intervals.mean(equal_positions(first, second, eot)))
        alike["two latents"].append(intervals.mean(equal_positions(first[0::2], first[1::2], eot)))
    sizes = range(1, 5)
    overlap = {
        "one latent": [intervals.mean(jaccard(first, second, n, eot)) for n in sizes],
        "two latents": [intervals.mean(jaccard(first[0::2], first[1::2], n, eot)) for n in sizes],
    }
    note = f"{even} latents of held-out text, each decoded twice; {even // 2} pairs of two latents"
    return [
        figure(
            "equal_positions",
            "figure 3",
            "Texts decoded from one latent and from two",
            log("decoding steps"),
            linear("share of equal positions"),
            [series(name, decode_steps, values) for name, values in alike.items()],
            note,
        ),
        figure(
            "ngram_overlap",
            "figure 4",
            "n-grams shared by texts decoded from one latent and from two",
            linear("n"),
            linear("Jaccard overlap of n-grams"),
            [series(name, sizes, values) for name, values in overlap.items()],
            f"{note}; {decode_steps[-1]} decoding steps",
        ),
    ]
