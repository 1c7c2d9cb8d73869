"""Ancestral decoding against the enumerated law of a language of 27 sentences; nucleus and draw against plain numpy.

The denoiser is a table of the language's exact conditionals, with large logits on the mask and on padding.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diladiff_jax.sampling import tokens

V, L, MASK = 3, 3, 3
SAMPLEABLE = np.arange(V + 2) < V
SENTENCES = list(itertools.product(range(V), repeat=L))
JOINT = dict(zip(SENTENCES, np.random.default_rng(0).dirichlet(np.full(V**L, 0.7)), strict=True))
N = 40_000


def conditional(context, position):
    """p(x^position = . | the tokens of `context` that are not masked), `[V]`."""
    p = np.zeros(V)
    for x, mass in JOINT.items():
        if all(c in (MASK, a) for c, a in zip(context, x, strict=True)):
            p[x[position]] += mass
    return p / p.sum()


CONTEXTS = list(itertools.product(range(V + 1), repeat=L))
TABLE = {c: [conditional(c, l) for l in range(L)] for c in CONTEXTS}
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


@functools.cache
def law(steps, prompt=(MASK,) * L):
    """Probability of each sentence, enumerated over all assignments of the masked positions to `steps` steps."""
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
                mass *= TABLE[tuple(a if ok else MASK for a, ok in zip(x, known, strict=True))][l][
                    x[l]
                ]
            p[i] += mass / len(assignments)
    return p


@jax.jit
def sample(keys, prompt, steps, temperature=1.0, top_p=1.0):
    return tokens.ancestral(
        denoiser,
        logits_at,
        keys,
        prompt,
        MASK,
        jnp.asarray(SAMPLEABLE),
        steps,
        temperature=temperature,
        top_p=top_p,
    )


def counts_of(x):
    return np.bincount(np.asarray(x) @ [V * V, V, 1], minlength=V**L)


def prompts(prompt=(MASK,) * L, n=N):
    return jnp.broadcast_to(jnp.array(prompt), (n, L))


def test_law_of_one_step_is_the_product_of_marginals_and_of_many_the_joint():
    """The enumeration itself: one step gives the product of marginals, 40 steps come within 5% (total variation) of the joint."""
    marginals = [conditional((MASK,) * L, l) for l in range(L)]
    np.testing.assert_allclose(
        law(1), [np.prod([m[v] for m, v in zip(marginals, x, strict=True)]) for x in SENTENCES]
    )
    joint = np.array(list(JOINT.values()))
    distance = [0.5 * np.abs(law(steps) - joint).sum() for steps in (1, 4, 12)]
    assert distance[0] > 2 * distance[1] > 4 * distance[2] and distance[2] < 0.05


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_samples_follow_the_enumerated_law(steps, chi_square):
    """40,000 samples against the exact law of T steps (chi-square, false alarm 1e-4 each); T = 1 and T = 8 are told apart."""
    x, _ = sample(jax.random.split(jax.random.key(steps), N), prompts(), steps)
    assert chi_square(counts_of(x), law(steps)) > 1e-4
    assert chi_square(counts_of(x), law(1 if steps > 1 else 8)) < 1e-6


def test_samples_with_a_prompt_follow_its_law_and_keep_it(chi_square):
    """Given the middle token, the rest follows the enumerated conditional law (false alarm 1e-4); the given token never changes."""
    prompt = (MASK, 1, MASK)
    x, when = sample(jax.random.split(jax.random.key(5), N), prompts(prompt), 3)
    assert (x[:, 1] == 1).all() and (when[:, 1] == -1).all()
    assert chi_square(counts_of(x), law(3, prompt)) > 1e-4


def test_positions_unmask_uniformly_and_independently(chi_square):
    """The steps at which the three positions are unmasked are uniform on {0..3}^3 (chi-square, false alarm 1e-4)."""
    _, when = sample(jax.random.split(jax.random.key(6), N), prompts(), 4)
    assert chi_square(np.bincount(np.asarray(when) @ [16, 4, 1], minlength=64), np.ones(64)) > 1e-4


@pytest.mark.parametrize("top_p", [0.0, 0.9, 1.0])
def test_mask_and_padding_are_never_drawn(top_p):
    """Whatever their logits; and nothing stays masked."""
    for steps in (1, 3):
        x, _ = sample(jax.random.split(jax.random.key(7), N), prompts(), steps, 1.0, top_p)
        assert (np.asarray(x) < V).all()


@pytest.mark.parametrize(
    "form",
    [
        tokens.ancestral,
        tokens.by_confidence,
        functools.partial(tokens.by_confidence, threshold=0.9),
    ],
    ids=["random", "confidence", "threshold"],
)
@pytest.mark.parametrize("temperature, top_p", [(0.0, 0.9), (1.0, 0.0), (1.0, 0.9), (1.0, 1.0)])
def test_a_network_gone_wrong_still_gives_text(form, temperature, top_p):
    """Rows of -inf, of NaN, of both, of +inf: every position is filled with text, and decoding ends; +inf is certain."""
    wrong = jnp.array(
        [
            [-jnp.inf] * 5,
            [jnp.nan] * 5,
            [-jnp.inf, jnp.nan, -jnp.inf, 8.0, 9.0],
            [0.0, jnp.inf, 0.0, jnp.inf, jnp.nan],
        ]
    )
    logits = jnp.tile(wrong[None, :, :], (200, 1, 1))
    filled, when = form(
        lambda x, k: logits,
        logits_at,
        jax.random.split(jax.random.key(0), 200),
        jnp.full((200, 4), MASK),
        MASK,
        SAMPLEABLE,
        3,
        temperature=temperature,
        top_p=top_p,
    )
    assert SAMPLEABLE[np.asarray(filled)].all() and (np.asarray(when) >= 0).all()
    assert (filled[:, 3] == 1).all()


def test_a_row_with_nothing_left_is_uniform_over_text(chi_square):
    """Of -inf or NaN alone: each id of text as often as any other (chi-square, false alarm 1e-4); a row that has something is as `restrict` makes it."""
    rows = jnp.array([[-jnp.inf] * 5, [jnp.nan] * 5, [0.3, -jnp.inf, 1.0, 8.0, 9.0]])
    logits = tokens.of_text(rows, SAMPLEABLE)
    for row in logits[:2]:
        drawn = tokens.draw(
            jnp.broadcast_to(jax.nn.softmax(row), (3000, 5)),
            jax.random.uniform(jax.random.key(1), (3000,)),
        )
        assert chi_square(np.bincount(drawn, minlength=5)[:3], np.ones(3)) > 1e-4
    np.testing.assert_array_equal(logits[2], jnp.array([0.3, -jnp.inf, 1.0, -jnp.inf, -jnp.inf]))


def test_each_sample_depends_on_its_own_key_alone():
    """The same keys in a batch of 64, in another order, and one by one give the same samples."""
    keys = jax.random.split(jax.random.key(8), 64)
    whole, when = sample(keys, prompts(n=64), 5)
    order = np.random.default_rng(0).permutation(64)
    for chosen in (order, order[:7], order[:1]):
        x, w = sample(keys[chosen], prompts(n=len(chosen)), 5)
        np.testing.assert_array_equal(x, whole[chosen])
        np.testing.assert_array_equal(w, when[chosen])
    assert len(np.unique(whole, axis=0)) > 5


def test_temperature_zero_and_nucleus_zero_take_the_mode():
    """In one step both give every position's most likely token, with every key."""
    mode = [int(np.argmax(conditional((MASK,) * L, l))) for l in range(L)]
    for temperature, top_p in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.9)):
        x, _ = sample(
            jax.random.split(jax.random.key(9), 200), prompts(n=200), 1, temperature, top_p
        )
        np.testing.assert_array_equal(x, np.tile(mode, (200, 1)))


def test_temperature_sharpens_by_powers(chi_square):
    """At temperature 0.5 one step follows the product of squared marginals (chi-square, false alarm 1e-4)."""
    x, _ = sample(jax.random.split(jax.random.key(10), N), prompts(), 1, 0.5, 1.0)
    marginals = [conditional((MASK,) * L, l) ** 2 for l in range(L)]
    expected = [
        np.prod([m[v] / m.sum() for m, v in zip(marginals, s, strict=True)]) for s in SENTENCES
    ]
    assert chi_square(counts_of(x), expected) > 1e-4


def test_one_program_serves_every_setting():
    """Steps, temperature and nucleus are run-time values: no second compilation for the same shapes."""
    f = jax.jit(lambda keys, prompt, *settings: sample.__wrapped__(keys, prompt, *settings))
    keys = jax.random.split(jax.random.key(0), 2)
    for setting in ((1, 1.0, 1.0), (7, 0.0, 0.5), (3, 0.7, 0.0)):
        f(keys, prompts(n=2), *setting)
    assert f._cache_size() == 1


def every_position(keys, prompt, steps, temperature, top_p):
    """The plain sampler with the same draws: all logits in every step, nothing left out."""
    when_key, what_key = jax.vmap(lambda key: jax.random.split(key))(keys).T
    uniforms = lambda keys: jax.vmap(lambda key: jax.random.uniform(key, (L,)))(keys)
    when, u = jnp.minimum(jnp.floor(uniforms(when_key) * steps), steps - 1), uniforms(what_key)
    x = prompt
    for k in range(steps):
        logits = jnp.where(jnp.asarray(SAMPLEABLE)[None, None, :], denoiser(x), -jnp.inf)
        drawn = tokens.draw(tokens.token_distribution(logits, temperature, top_p), u)
        x = jnp.where((prompt == MASK) & (when == k), drawn, x)
    return x


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8)])
def test_chosen_positions_give_the_tokens_of_the_plain_sampler(steps, temperature, top_p):
    """The same draws, the same tokens, with one position of each row at a time, two, or all at once; given tokens included."""
    keys = jax.random.split(jax.random.key(11), 500)
    prompt = prompts(n=500).at[:100, 1].set(2)
    expected = jax.jit(every_position, static_argnums=2)(keys, prompt, steps, temperature, top_p)
    for rows in (1, 1_000, 10_000):
        x, _ = jax.jit(
            lambda keys: tokens.ancestral(
                denoiser,
                logits_at,
                keys,
                prompt,
                MASK,
                jnp.asarray(SAMPLEABLE),
                steps,
                temperature=temperature,
                top_p=top_p,
                rows=rows,
            )
        )(keys)
        np.testing.assert_array_equal(x, expected)


def test_steps_that_unmask_nothing_are_left_out():
    """1,000 steps for two rows of three positions call the network at most six times, and for rows with nothing masked never."""
    calls = []

    def counted(x, k):
        jax.debug.callback(lambda: calls.append(1))
        return denoiser(x)

    run = jax.jit(
        lambda keys, prompt: tokens.ancestral(
            counted, logits_at, keys, prompt, MASK, jnp.asarray(SAMPLEABLE), 1_000
        )
    )
    x, when = run(jax.random.split(jax.random.key(12), 2), prompts(n=2))
    jax.effects_barrier()
    assert len(calls) == len(np.unique(when)) <= 6 and (x < V).all()
    calls.clear()
    given = prompts((0, 1, 2), 2)
    x, when = run(jax.random.split(jax.random.key(12), 2), given)
    jax.effects_barrier()
    assert not calls and (when == -1).all()
    np.testing.assert_array_equal(x, given)


# A context that is kept.


@pytest.mark.parametrize("every, renewed", [(2, 32), (4, 1), (100, 2)])
def test_a_context_renewed_where_it_changed_has_the_law_of_one_made_anew(
    every, renewed, monkeypatch, chi_square
):
    """Where the context is the tokens themselves nothing is lost: the enumerated law (chi-square, false alarm 1e-4), whatever is renewed at
    once; it is made as a whole once in `every` steps. Never renewed, a context of 100 steps gives the product of marginals."""
    monkeypatch.setattr(tokens, "RENEWED", renewed)
    calls = []

    def whole(x, k):
        jax.debug.callback(lambda: calls.append(1))
        return x + 0

    put = lambda context, x, positions: context.at[jnp.arange(len(x))[:, None], positions].set(
        x, mode="drop"
    )
    look = lambda context, positions: logits_at(denoiser(context), positions)

    def draws(renew):
        run = lambda keys: tokens.ancestral(
            whole,
            look,
            keys,
            prompts(),
            MASK,
            jnp.asarray(SAMPLEABLE),
            8,
            top_p=1.0,
            renew=renew,
            every=every,
        )
        return counts_of(jax.jit(run)(jax.random.split(jax.random.key(every), N))[0])

    assert chi_square(draws(put), law(8)) > 1e-4
    jax.effects_barrier()
    assert len(calls) == -(-8 // every)
    stale = draws(lambda context, x, positions: context)
    assert chi_square(stale, law(8)) < 1e-6
    if every > 8:
        assert chi_square(stale, law(1)) > 1e-4


# Other orders.


def ordered(form, keys, prompt, steps, **kw):
    run = jax.jit(
        lambda keys: form(
            denoiser,
            logits_at,
            keys,
            prompt,
            MASK,
            jnp.asarray(SAMPLEABLE),
            steps,
            **({"temperature": 1.0, "top_p": 1.0} | kw),
        )
    )
    x, when = run(keys)
    return np.asarray(x), np.asarray(when)


@functools.cache
def law_by_confidence(steps):
    """Probability of each sentence where step k keeps the surest of its draws, up to floor(3 (k + 1) / steps) tokens in all, enumerated."""

    def after(context, k):
        free = [l for l in range(L) if context[l] == MASK]
        if not free:
            return {context: 1.0}
        found = dict.fromkeys(SENTENCES, 0.0)
        for draws in itertools.product(range(V), repeat=len(free)):
            sure = [TABLE[context][l][v] for l, v in zip(free, draws, strict=True)]
            count = L * (k + 1) // steps - (L - len(free))
            best = sorted(range(len(free)), key=lambda i: -sure[i])[:count]
            new = list(context)
            for i in best:
                new[free[i]] = draws[i]
            for sentence, mass in after(tuple(new), k + 1).items():
                found[sentence] += mass * np.prod(sure)
        return found

    return np.array([after((MASK,) * L, 0)[sentence] for sentence in SENTENCES])


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_confident_samples_follow_their_enumerated_law(steps, chi_square):
    """40,000 samples, in two batches of rounds, against the law of keeping the surest draws (chi-square, false alarm 1e-4), which is not that of random order."""
    x, when = ordered(
        tokens.by_confidence,
        jax.random.split(jax.random.key(steps), N),
        prompts(),
        steps,
        rows=2 * N,
    )
    expected, counts = law_by_confidence(steps), counts_of(x)
    rare = expected * N < 10  # too few for the approximation, and so one cell
    pooled = (
        [np.append(values[~rare], values[rare].sum()) for values in (counts, expected)]
        if rare.any()
        else (counts, expected)
    )
    assert chi_square(*pooled) > 1e-4
    if steps > 1:
        assert chi_square(counts_of(x), law(steps)) < 1e-6
    assert [
        np.sum(when == k, axis=1).tolist() == [L * (k + 1) // steps - L * k // steps] * N
        for k in range(steps)
    ] == [True] * steps


def test_a_threshold_keeps_what_is_sure_enough_and_something_in_any_case():
    """At 0 everything goes in one step, above every probability one a step; between, a step keeps exactly the draws as probable as it, or the surest."""
    keys = jax.random.split(jax.random.key(3), 400)
    assert (ordered(tokens.by_confidence, keys, prompts(n=400), 1, threshold=0.0)[1] == 0).all()
    assert (
        np.sort(ordered(tokens.by_confidence, keys, prompts(n=400), 1, threshold=1.1)[1], axis=1)
        == [0, 1, 2]
    ).all()
    x, when = ordered(
        tokens.by_confidence, keys, prompts(n=400).at[:50, 1].set(2), 1, threshold=0.45
    )
    assert (
        (when[:50, 1] == -1).all()
        and (x[:50, 1] == 2).all()
        and (x < V).all()
        and len(np.unique(when)) > 2
    )
    for row, steps in zip(x, when, strict=True):
        for k in range(steps.max() + 1):
            context = tuple(np.where(steps < k, row, MASK))
            kept = [TABLE[context][l][row[l]] for l in range(L) if steps[l] == k]
            assert len(kept) == 1 or min(kept) >= 0.45 - 1e-5


def test_confidence_is_the_models_own_whatever_the_draw_is_made_with():
    """At temperature 0 every draw is certain, yet the order is that of the modes' probabilities, and a threshold is of them."""
    keys = jax.random.split(jax.random.key(5), 4)
    modes = [conditional((MASK,) * L, l).max() for l in range(L)]
    assert len({round(p, 3) for p in modes}) == L
    _, when = ordered(tokens.by_confidence, keys, prompts(n=4), 3, temperature=0.0)
    assert (when[:, int(np.argmax(modes))] == 0).all()
    for settings in (dict(temperature=0.0), dict(temperature=1.0, top_p=0.0)):
        _, when = ordered(
            tokens.by_confidence,
            keys,
            prompts(n=4),
            1,
            threshold=sorted(modes)[1] + 1e-3,
            **settings,
        )
        np.testing.assert_array_equal(when == 0, np.tile(np.array(modes) == max(modes), (4, 1)))


def test_even_steps_unmask_the_same_number_in_uniform_order(chi_square):
    """Of three positions in two steps one and two, in three steps one each, every order equally likely (false alarm 1e-4); prompts are kept;
    as many steps as positions have the joint's own law."""
    keys = jax.random.split(jax.random.key(4), N)
    _, when = ordered(tokens.ancestral, keys, prompts(), 2, equal_counts=True)
    assert (np.sort(when, axis=1) == [0, 0, 1]).all()
    x, when = ordered(tokens.ancestral, keys, prompts(), 3, equal_counts=True)
    assert (
        chi_square(
            [np.all(when == order, axis=1).sum() for order in itertools.permutations(range(3))],
            np.ones(6),
        )
        > 1e-4
    )
    assert chi_square(counts_of(x), np.array(list(JOINT.values()))) > 1e-4
    x, when = ordered(
        tokens.ancestral, keys[:100], prompts((MASK, 1, MASK), 100), 2, equal_counts=True
    )
    assert (x[:, 1] == 1).all() and (np.sort(when, axis=1) == [-1, 0, 1]).all()


# Nucleus.


def plain_nucleus(p, top_p):
    """By sorting, float64: the smallest set of most likely tokens of mass >= top_p; ties with the last are kept."""
    order = np.argsort(-p, kind="stable")
    size = min(int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1, len(p))
    return p >= p[order[size - 1]], np.abs(np.cumsum(p[order]) - top_p).min()


def rows():
    """Logits of many kinds: flat, peaky, Zipf, with ties, with -inf, one token alone."""
    rng = np.random.default_rng(0)
    peaky, flat = rng.normal(size=(40, 50)) * 6, rng.normal(size=(40, 50)) * 0.01
    ties = rng.integers(0, 4, size=(40, 50)).astype(float)
    zipf = rng.permuted(np.tile(-np.log(np.arange(1, 51)), (40, 1)), axis=1)
    holes = np.where(rng.random((40, 50)) < 0.5, -np.inf, rng.normal(size=(40, 50)))
    holes[:, 0] = 0.0
    alone = np.full((1, 50), -np.inf)
    alone[0, 17] = 3.0
    return np.concatenate([peaky, flat, ties, zipf, holes, alone]).astype(np.float32)


distribution = jax.jit(tokens.token_distribution)


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_nucleus_equals_the_sorted_one(top_p, temperature):
    """The kept set is that of a sort in float64, wherever no prefix's mass is within 1e-5 of top_p; kept values are the softmax's."""
    logits = rows()
    p = np.asarray(distribution(logits, temperature, top_p))
    compared = 0
    for row, ours in zip(logits.astype(np.float64), p, strict=True):
        softmax = np.exp((row - row.max()) / temperature)
        softmax /= softmax.sum()
        # Ties are equal in float32 before the exponential, hence after it too.
        kept, margin = plain_nucleus(softmax.astype(np.float32).astype(np.float64), top_p)
        if margin > 1e-5:
            compared += 1
            np.testing.assert_array_equal(ours > 0, kept & (softmax > 0))
            np.testing.assert_allclose(ours[kept], softmax[kept], rtol=1e-4)
    assert compared > 0.8 * len(logits)


def test_ends_of_nucleus_and_temperature():
    """top_p 1 keeps the whole softmax, top_p 0 and temperature 0 the most likely tokens only; -inf is never kept."""
    logits = rows()
    best = logits == logits.max(axis=1, keepdims=True)
    np.testing.assert_array_equal(distribution(logits, 1.0, 1.0) > 0, np.isfinite(logits))
    np.testing.assert_array_equal(distribution(logits, 1.0, 0.0) > 0, best)
    for top_p in (0.0, 0.5, 1.0):
        np.testing.assert_array_equal((distribution(logits, 0.0, top_p) > 0), best)
    for temperature in (1e-30, 1e-3, 1e3):
        p = distribution(logits, temperature, 0.9)
        assert np.isfinite(p).all() and (np.asarray(p).sum(axis=1) > 0).all()


def test_threshold_is_exact_to_the_token():
    """With probabilities that are powers of two, sums are exact and so is the set at and around every boundary."""
    p = jnp.array([2.0**-i for i in range(1, 12)] + [2.0**-11])
    for i in range(1, 11):
        boundary = 1 - 2.0**-i
        for top_p, size in (
            (boundary, i),
            (np.nextafter(np.float32(boundary), np.float32(1)), i + 1),
        ):
            assert float(tokens.nucleus_threshold(p, top_p)[0]) == 2.0**-size


# Drawing.


def test_draw_follows_the_unnormalized_probabilities(chi_square):
    """40,000 draws from [3, 0, 1, 0, 4, 2, 0] (chi-square, false alarm 1e-4), none of them of probability zero."""
    p = jnp.array([3.0, 0, 1, 0, 4, 2, 0])
    x = jax.jit(tokens.draw)(
        jnp.broadcast_to(p, (N, 7)), jax.random.uniform(jax.random.key(0), (N,))
    )
    assert x.dtype == jnp.int32
    assert chi_square(np.bincount(x, minlength=7), p) > 1e-4


def test_draw_at_the_ends_of_the_uniform():
    """Uniform 0 gives the first positive index; just below 1 gives the last; each index has an interval as long as its probability."""
    p = jnp.array([[0.0, 0.25, 0, 0.5, 0.25, 0]])
    at = lambda u: int(tokens.draw(p, jnp.full((1,), u, jnp.float32))[0])
    assert [at(u) for u in (0.0, 0.2499, 0.25, 0.7499, 0.75)] == [1, 1, 3, 3, 4]
    assert at(np.nextafter(np.float32(1), np.float32(0))) == 4


def test_no_rounding_draws_an_index_of_probability_zero():
    """At levels that equal the partial sums (of a parallel sum, which may rise or fall by rounding where p = 0) the index still has p > 0."""
    size = 4096
    p = jax.random.gamma(jax.random.key(0), 0.3, (size,))
    p = jnp.where(jax.random.bernoulli(jax.random.key(1), 0.5, (size,)), p / p.sum(), 0.0)
    level = jnp.cumsum(p) / jnp.cumsum(p)[-1]
    u = jnp.clip(jnp.concatenate([level, jnp.nextafter(level, 0.0)]), 0, 1 - 2.0**-24)[:, None]
    drawn = jax.jit(jax.lax.map, static_argnums=0)(lambda u: tokens.draw(p[None, :], u), u)
    assert (p[drawn] > 0).all()


def test_rare_tokens_keep_their_share():
    """In a Zipf vocabulary of 2,048 the mean of log p over 32,000 draws is minus the entropy, z < 4.5 (false alarm 7e-6)."""
    p = 1 / np.arange(1, 2049)
    p /= p.sum()
    rows = jnp.broadcast_to(jnp.asarray(p, jnp.float32), (320, 2048))
    draws = jax.jit(
        lambda rows, keys: jax.lax.map(
            lambda key: tokens.draw(rows, jax.random.uniform(key, (320,))), keys
        )
    )
    logs = np.log(p)[np.asarray(draws(rows, jax.random.split(jax.random.key(0), 100)))].ravel()
    entropy = -(p * np.log(p)).sum()
    error = np.sqrt((p * np.log(p) ** 2).sum() - entropy**2) / np.sqrt(logs.size)
    assert abs(logs.mean() + entropy) < 4.5 * error
