"""A language of 27 sentences whose conditionals and sampling laws can be enumerated."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np

from diladiff_jax.diffusion.masking import AbsorbingProcess
from diladiff_jax.sampling.orders import TokenNetwork

V, L, MASK = 3, 3, 3
SAMPLEABLE = np.arange(V + 2) < V  # ids V and V + 1 are the mask and padding
PROCESS = AbsorbingProcess(MASK, SAMPLEABLE)
SENTENCES = list(itertools.product(range(V), repeat=L))
JOINT = dict(zip(SENTENCES, np.random.default_rng(0).dirichlet(np.full(V**L, 0.7)), strict=True))


def conditional(context, position):
    """p(x^position = . | the unmasked tokens of `context`), `[V]`."""
    p = np.zeros(V)
    for x, mass in JOINT.items():
        if all(c in (MASK, a) for c, a in zip(context, x, strict=True)):
            p[x[position]] += mass
    return p / p.sum()


CONTEXTS = list(itertools.product(range(V + 1), repeat=L))
TABLE = {c: [conditional(c, l) for l in range(L)] for c in CONTEXTS}
# The logits of mask and padding are the largest: samplers must never choose them.
LOGITS = jnp.asarray(
    [[np.append(np.log(np.maximum(p, 1e-30)), [8.0, 9.0]) for p in TABLE[c]] for c in CONTEXTS],
    jnp.float32,
)


def denoiser(x, k=None):
    """Exact logits `[B, L, V + 2]` of tokens `[B, L]`."""
    return LOGITS[jnp.sum(x * jnp.array([[(V + 1) ** 2, V + 1, 1]]), axis=1)]


def logits_at(logits, positions):
    """The rows of `logits [B, L, V + 2]` at `positions [B, K]`."""
    return jnp.take_along_axis(logits, positions[:, :, None], axis=1)


NETWORK = TokenNetwork(denoiser, logits_at)


@functools.cache
def law(steps, prompt=(MASK,) * L):
    """Probability of each sentence under the reverse process on `steps` equal steps.

    Enumerated over all assignments of the masked positions to the steps that unmask them.
    """
    free = [l for l in range(L) if prompt[l] == MASK]
    assignments = list(itertools.product(range(steps), repeat=len(free)))
    p = np.zeros(len(SENTENCES))
    for i, x in enumerate(SENTENCES):
        if any(prompt[l] not in (MASK, x[l]) for l in range(L)):
            continue
        for assignment in assignments:
            mass = 1.0
            for l, k in zip(free, assignment, strict=True):
                known = [prompt[j] != MASK or assignment[free.index(j)] < k for j in range(L)]
                context = tuple(a if ok else MASK for a, ok in zip(x, known, strict=True))
                mass *= TABLE[context][l][x[l]]
            p[i] += mass / len(assignments)
    return p


def sentence_counts(x):
    """How often each of `SENTENCES` occurs in `x [B, L]`."""
    return np.bincount(np.asarray(x) @ [V * V, V, 1], minlength=V**L)


def prompts(n, prompt=(MASK,) * L):
    """`n` copies of a prompt, `[n, L]`."""
    return jnp.broadcast_to(jnp.array(prompt), (n, L))
