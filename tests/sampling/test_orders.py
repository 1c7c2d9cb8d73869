"""Unmasking orders against their enumerated laws, with a table of exact conditionals as network."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_language import (
    JOINT,
    MASK,
    NETWORK,
    PROCESS,
    SAMPLEABLE,
    SENTENCES,
    TABLE,
    L,
    V,
    conditional,
    denoiser,
    law,
    logits_at,
    prompts,
    sentence_counts,
)

from diladiff_jax.sampling import orders
from diladiff_jax.sampling.categorical import sample_categorical, token_distribution
from diladiff_jax.sampling.orders import ORDERS, TokenControls, TokenNetwork

N = 40_000
MARGINALS = [conditional((MASK,) * L, l) for l in range(L)]


@functools.cache
def compiled(order, network=NETWORK, **options):
    """`(keys, prompt, controls) -> (tokens, steps)`, jitted once for all settings."""
    return jax.jit(
        lambda keys, prompt, controls: order(network, PROCESS, keys, prompt, controls, **options)
    )


def decode(order, keys, prompt, steps, *, network=NETWORK, options=None, **controls):
    """Tokens and steps of an order; temperature and nucleus are 1 unless given."""
    settings = TokenControls(steps, **({"temperature": 1.0, "top_p": 1.0} | controls))
    run = compiled(order, network, **(options or {}))
    return tuple(map(np.asarray, run(keys, prompt, settings)))


def keys_of(seed, n=N):
    return jax.random.split(jax.random.key(seed), n)


def test_the_enumerated_law_goes_from_the_marginals_to_the_joint():
    """One step gives the product of marginals; twelve come within 5% of the joint.

    The distance is the total variation.
    """
    product = [np.prod([m[v] for m, v in zip(MARGINALS, x, strict=True)]) for x in SENTENCES]
    np.testing.assert_allclose(law(1), product)
    joint = np.array(list(JOINT.values()))
    distance = [0.5 * np.abs(law(steps) - joint).sum() for steps in (1, 4, 12)]
    assert distance[0] > 2 * distance[1] > 4 * distance[2] and distance[2] < 0.05


# Every order.


@pytest.mark.parametrize("order", ORDERS)
def test_a_diverged_network_still_gives_text(order):
    """Rows of -inf, of NaN, of both, and of +inf, which is certain: every position becomes text."""
    rows = jnp.array(
        [
            [-jnp.inf] * 5,
            [jnp.nan] * 5,
            [-jnp.inf, jnp.nan, -jnp.inf, 8.0, 9.0],
            [0.0, jnp.inf, 0.0, jnp.inf, jnp.nan],
        ]
    )
    network = TokenNetwork(lambda x, k: jnp.tile(rows[None], (200, 1, 1)), logits_at)
    blank = jnp.full((200, 4), MASK)
    for temperature, top_p in ((0.0, 0.9), (1.0, 0.0), (1.0, 0.9), (1.0, 1.0)):
        x, when = decode(
            ORDERS[order].decode,
            keys_of(0, 200),
            blank,
            3,
            network=network,
            temperature=temperature,
            top_p=top_p,
        )
        assert SAMPLEABLE[x].all() and (when >= 0).all()
        assert (x[:, 3] == 1).all()


# Random order.


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_samples_follow_the_enumerated_law(steps, chi_square):
    """40,000 samples (chi-square, false alarm 1e-4); the laws of 1 and 8 steps are rejected."""
    x, _ = decode(orders.ancestral, keys_of(steps), prompts(N), steps)
    assert chi_square(sentence_counts(x), law(steps)) > 1e-4
    assert chi_square(sentence_counts(x), law(1 if steps > 1 else 8)) < 1e-6


def test_samples_with_a_prompt_keep_it_and_follow_its_law(chi_square):
    """Given the middle token, the others follow the conditional law (false alarm 1e-4)."""
    prompt = (MASK, 1, MASK)
    x, when = decode(orders.ancestral, keys_of(5), prompts(N, prompt), 3)
    assert (x[:, 1] == 1).all() and (when[:, 1] == -1).all()
    assert chi_square(sentence_counts(x), law(3, prompt)) > 1e-4


def test_positions_unmask_uniformly_and_independently(chi_square):
    """The steps of the three positions are uniform on {0..3}^3 (chi-square, false alarm 1e-4)."""
    _, when = decode(orders.ancestral, keys_of(6), prompts(N), 4)
    assert chi_square(np.bincount(when @ [16, 4, 1], minlength=64), np.ones(64)) > 1e-4


@pytest.mark.parametrize("top_p", [0.0, 0.9, 1.0])
def test_mask_and_padding_are_never_sampled(top_p):
    """Although their logits are the largest; and nothing stays masked."""
    for steps in (1, 3):
        x, _ = decode(orders.ancestral, keys_of(7), prompts(N), steps, top_p=top_p)
        assert (x < V).all()


def test_each_sample_depends_on_its_own_key_alone():
    """The same keys in a batch of 64, in another order, and one by one give the same samples."""
    keys = keys_of(8, 64)
    every, when = decode(orders.ancestral, keys, prompts(64), 5)
    order = np.random.default_rng(0).permutation(64)
    for chosen in (order, order[:7], order[:1]):
        x, w = decode(orders.ancestral, keys[chosen], prompts(len(chosen)), 5)
        np.testing.assert_array_equal(x, every[chosen])
        np.testing.assert_array_equal(w, when[chosen])
    assert len(np.unique(every, axis=0)) > 5


def test_temperature_zero_and_nucleus_zero_take_the_mode():
    """In one step, both give the most likely token of every position, with every key."""
    mode = [int(np.argmax(p)) for p in MARGINALS]
    for temperature, top_p in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.9)):
        x, _ = decode(
            orders.ancestral, keys_of(9, 200), prompts(200), 1, temperature=temperature, top_p=top_p
        )
        np.testing.assert_array_equal(x, np.tile(mode, (200, 1)))


def test_temperature_one_half_squares_the_probabilities(chi_square):
    """One step follows the product of the squared marginals (chi-square, false alarm 1e-4)."""
    x, _ = decode(orders.ancestral, keys_of(10), prompts(N), 1, temperature=0.5)
    squared = [p**2 / (p**2).sum() for p in MARGINALS]
    expected = [np.prod([p[v] for p, v in zip(squared, s, strict=True)]) for s in SENTENCES]
    assert chi_square(sentence_counts(x), expected) > 1e-4


def test_one_program_serves_every_setting():
    """Steps, temperature and nucleus are run-time values: other values compile nothing."""
    run = jax.jit(lambda *args: orders.ancestral(NETWORK, PROCESS, *args))
    for controls in ((1, 1.0, 1.0), (7, 0.0, 0.5), (3, 0.7, 0.0)):
        run(keys_of(0, 2), prompts(2), TokenControls(*controls))
    assert run._cache_size() == 1


def all_logits_in_every_step(keys, prompt, steps, temperature, top_p):
    """A reference sampler with the same draws that computes all logits in every step."""
    when_key, what_key = jax.vmap(lambda key: jax.random.split(key))(keys).T
    uniforms = lambda keys: jax.vmap(lambda key: jax.random.uniform(key, (L,)))(keys)
    when, u = jnp.minimum(jnp.floor(uniforms(when_key) * steps), steps - 1), uniforms(what_key)
    x = prompt
    for k in range(steps):
        logits = jnp.where(jnp.asarray(SAMPLEABLE)[None, None, :], denoiser(x), -jnp.inf)
        drawn = sample_categorical(token_distribution(logits, temperature, top_p), u)
        x = jnp.where((prompt == MASK) & (when == k), drawn, x)
    return x


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8)])
def test_logits_of_chosen_positions_give_the_tokens_of_all_logits(steps, temperature, top_p):
    """The same draws give the same tokens with one, two or all positions of a row at a time."""
    keys, prompt = keys_of(11, 500), prompts(500).at[:100, 1].set(2)
    reference = jax.jit(all_logits_in_every_step, static_argnums=2)
    expected = reference(keys, prompt, steps, temperature, top_p)
    for rows in (1, 1_000, 10_000):
        x, _ = decode(
            orders.ancestral,
            keys,
            prompt,
            steps,
            options=dict(rows=rows),
            temperature=temperature,
            top_p=top_p,
        )
        np.testing.assert_array_equal(x, expected)


def test_steps_that_unmask_nothing_call_no_network():
    """1,000 steps for two rows of three positions need at most six calls; full rows need none."""
    calls = []

    def counted(x, k):
        jax.debug.callback(lambda: calls.append(1))
        return denoiser(x)

    network = TokenNetwork(counted, logits_at)
    x, when = decode(orders.ancestral, keys_of(12, 2), prompts(2), 1_000, network=network)
    jax.effects_barrier()
    assert len(calls) == len(np.unique(when)) <= 6 and (x < V).all()
    calls.clear()
    given = prompts(2, (0, 1, 2))
    x, when = decode(orders.ancestral, keys_of(12, 2), given, 1_000, network=network)
    jax.effects_barrier()
    assert not calls and (when == -1).all()
    np.testing.assert_array_equal(x, given)


# A context that is kept between steps.


@pytest.mark.parametrize("every, chunk", [(2, 32), (4, 1), (100, 2)])
def test_a_refreshed_context_has_the_law_of_a_recomputed_one(every, chunk, monkeypatch, chi_square):
    """Where the context is the tokens themselves, refreshing loses nothing, whatever the chunk.

    The law is the enumerated one (chi-square, false alarm 1e-4), and the context is computed once
    in `every` steps. A context of 100 steps that is never refreshed gives the product of marginals.
    """
    monkeypatch.setattr(orders, "REFRESH_CHUNK", chunk)
    calls = []

    def context(x, k):
        jax.debug.callback(lambda: calls.append(1))
        return x + 0

    def refresh(context, x, positions):
        return context.at[jnp.arange(len(x))[:, None], positions].set(x, mode="drop")

    def counts(refresh):
        logits = lambda context, positions: logits_at(denoiser(context), positions)
        network = TokenNetwork(context, logits, refresh, every)
        return sentence_counts(
            decode(orders.ancestral, keys_of(every), prompts(N), 8, network=network)[0]
        )

    assert chi_square(counts(refresh), law(8)) > 1e-4
    jax.effects_barrier()
    assert len(calls) == -(-8 // every)
    stale = counts(lambda context, x, positions: context)
    assert chi_square(stale, law(8)) < 1e-6
    if every > 8:
        assert chi_square(stale, law(1)) > 1e-4


# By confidence, and with equal counts.


@functools.cache
def law_by_confidence(steps):
    """Probability of each sentence if step k keeps the most confident of its samples.

    It keeps up to floor(3 (k + 1) / steps) tokens in all.
    """

    def after(context, k):
        free = [l for l in range(L) if context[l] == MASK]
        if not free:
            return {context: 1.0}
        found = dict.fromkeys(SENTENCES, 0.0)
        for draws in itertools.product(range(V), repeat=len(free)):
            confidence = [TABLE[context][l][v] for l, v in zip(free, draws, strict=True)]
            count = L * (k + 1) // steps - (L - len(free))
            best = sorted(range(len(free)), key=lambda i: -confidence[i])[:count]
            new = list(context)
            for i in best:
                new[free[i]] = draws[i]
            for sentence, mass in after(tuple(new), k + 1).items():
                found[sentence] += mass * np.prod(confidence)
        return found

    return np.array([after((MASK,) * L, 0)[sentence] for sentence in SENTENCES])


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_confident_samples_follow_their_enumerated_law(steps, chi_square):
    """40,000 samples in two chunks (chi-square, false alarm 1e-4); that of random order differs."""
    x, when = decode(
        orders.by_confidence, keys_of(steps), prompts(N), steps, options=dict(rows=2 * N)
    )
    expected, counts = law_by_confidence(steps), sentence_counts(x)
    if (rare := expected * N < 10).any():  # too few each for the approximation: one cell for all
        counts, expected = (np.append(v[~rare], v[rare].sum()) for v in (counts, expected))
    assert chi_square(counts, expected) > 1e-4
    if steps > 1:
        assert chi_square(sentence_counts(x), law(steps)) < 1e-6
    for k in range(steps):
        count = L * (k + 1) // steps - L * k // steps
        assert (np.sum(when == k, axis=1) == count).all()


def test_a_threshold_keeps_confident_tokens_and_at_least_one():
    """Threshold 0 needs one step; one above every probability needs a step for each token.

    In between, a step keeps the tokens at least as confident as the threshold, or the best one.
    """
    blank, keys = prompts(400), keys_of(3, 400)
    decode_until = functools.partial(
        decode, orders.by_confidence, keys, steps=1, options=dict(use_threshold=True)
    )
    assert (decode_until(prompt=blank, threshold=0.0)[1] == 0).all()
    assert (np.sort(decode_until(prompt=blank, threshold=1.1)[1], axis=1) == [0, 1, 2]).all()
    x, when = decode_until(prompt=blank.at[:50, 1].set(2), threshold=0.45)
    assert (when[:50, 1] == -1).all() and (x[:50, 1] == 2).all()
    assert (x < V).all() and len(np.unique(when)) > 2
    for row, steps in zip(x, when, strict=True):
        for k in range(steps.max() + 1):
            context = tuple(np.where(steps < k, row, MASK))
            kept = [TABLE[context][l][row[l]] for l in range(L) if steps[l] == k]
            assert len(kept) == 1 or min(kept) >= 0.45 - 1e-5


def test_confidence_is_the_models_own_whatever_the_temperature():
    """At temperature 0 every sample is certain, yet order and threshold read the model's values."""
    keys, blank = keys_of(5, 4), prompts(4)
    modes = [p.max() for p in MARGINALS]
    assert len({round(p, 3) for p in modes}) == L
    _, when = decode(orders.by_confidence, keys, blank, 3, temperature=0.0)
    assert (when[:, int(np.argmax(modes))] == 0).all()
    for greedy in (dict(temperature=0.0), dict(top_p=0.0)):
        _, when = decode(
            orders.by_confidence,
            keys,
            blank,
            1,
            options=dict(use_threshold=True),
            threshold=sorted(modes)[1] + 1e-3,
            **greedy,
        )
        np.testing.assert_array_equal(when == 0, np.tile(np.array(modes) == max(modes), (4, 1)))


def test_equal_counts_unmask_the_same_number_in_uniform_order(chi_square):
    """Of three positions, two steps take one and two; three take one each, in every order.

    All orders are equally likely (false alarm 1e-4), the prompt is kept, and with a step for every
    position the law is the joint itself.
    """
    count = functools.partial(decode, orders.equal_counts)
    _, when = count(keys_of(4), prompts(N), 2)
    assert (np.sort(when, axis=1) == [0, 0, 1]).all()
    x, when = count(keys_of(4), prompts(N), 3)
    permutations = itertools.permutations(range(3))
    seen = [np.all(when == permutation, axis=1).sum() for permutation in permutations]
    assert chi_square(seen, np.ones(6)) > 1e-4
    assert chi_square(sentence_counts(x), np.array(list(JOINT.values()))) > 1e-4
    x, when = count(keys_of(4, 100), prompts(100, (MASK, 1, MASK)), 2)
    assert (x[:, 1] == 1).all() and (np.sort(when, axis=1) == [-1, 0, 1]).all()
