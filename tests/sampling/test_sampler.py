"""Generation from latents to tokens, on tiny random networks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from diladiff_jax.diffusion.gaussian import TangentSchedule, velocity_of_clean
from diladiff_jax.diffusion.masking import AbsorbingProcess
from diladiff_jax.options import OptionError
from diladiff_jax.sampling import orders
from diladiff_jax.sampling.categorical import normal_per_sample
from diladiff_jax.sampling.latent_sources import NullLatents, PriorLatents, StudentLatents
from diladiff_jax.sampling.options import SamplingOptions
from diladiff_jax.sampling.orders import ORDERS
from diladiff_jax.sampling.sampler import Controls, Sampler

LENGTH, VOCAB, MASK = 8, 12, 10
SCHEDULE = TangentSchedule(3.0)
CONTROLS = Controls(
    decode_steps=3, latent_steps=2, temperature=1.0, top_p=0.9, gamma=0.8, threshold=0.9
)
PROMPT = jnp.full((4, LENGTH), MASK).at[:, 2].set(7).at[1, 5].set(3)
SOURCES = {
    "none": None,
    "prior": PriorLatents(),
    "student": StudentLatents(),
    "null": NullLatents(),
}


@pytest.fixture(scope="module")
def process(sampleable):
    return AbsorbingProcess(MASK, sampleable)


@pytest.fixture(scope="module")
def sampler(networks, process):
    return Sampler(networks, SCHEDULE, process)


@pytest.fixture(scope="module")
def params(networks, random_parameters):
    """Parameters of everything that a sampler reads."""
    tokens, z, t = jnp.zeros((1, LENGTH), jnp.int32), jnp.zeros((1, 4, 6)), jnp.zeros((1,))
    inputs = {
        "denoiser": (tokens,),
        "decoder": (tokens, z),
        "teacher": (z, t, z),
        "student": (z, t, z, t),
    }
    return {
        name: random_parameters(getattr(networks, name), *inputs[name], seed=seed)
        for seed, name in enumerate(inputs)
    }


def generator(sampler, source=SOURCES["student"]):
    """The jitted `sampler.generate` of a latent source."""
    return jax.jit(lambda *args: sampler.generate(source, *args))


def with_options(sampler, **options):
    return dataclasses.replace(sampler, options=SamplingOptions(**options))


@pytest.mark.parametrize("source", SOURCES)
def test_a_sample_is_text_keeps_its_prompt_and_depends_on_its_index_alone(sampler, params, source):
    """In another batch and another order sample i is the same, and it differs from the others."""
    generate = generator(sampler, SOURCES[source])
    key, order = jax.random.key(3), jnp.array([3, 1, 0, 2])
    sample = generate(params, key, jnp.arange(4), PROMPT, CONTROLS)
    assert (sample.tokens < MASK).all()
    given = PROMPT != MASK
    np.testing.assert_array_equal(sample.tokens[given], PROMPT[given])
    np.testing.assert_array_equal(sample.unmasked_at == -1, given)
    assert (sample.unmasked_at < 3).all()
    other = generate(params, key, order, PROMPT[order], CONTROLS)
    np.testing.assert_array_equal(other.tokens, sample.tokens[order])
    assert len(np.unique(sample.tokens, axis=0)) == 4
    if source == "none":
        assert sample.latents is None
    else:
        assert sample.latents.shape == (4, 4, 6) and np.isfinite(sample.latents).all()
        np.testing.assert_allclose(other.latents, sample.latents[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [order for order in ORDERS if order != "random"])
def test_a_sample_of_any_order_is_text_and_depends_on_its_index_alone(sampler, params, order):
    """As a sample in random order."""
    generate, key = generator(with_options(sampler, order=order)), jax.random.key(3)
    sample = generate(params, key, jnp.arange(4), PROMPT, CONTROLS)
    assert (sample.tokens < MASK).all()
    np.testing.assert_array_equal(sample.unmasked_at == -1, PROMPT != MASK)
    turned = jnp.array([3, 1, 0, 2])
    other = generate(params, key, turned, PROMPT[turned], CONTROLS)
    np.testing.assert_array_equal(other.tokens, sample.tokens[turned])


@pytest.mark.parametrize("order", ["random", pytest.param("count", marks=pytest.mark.slow)])
def test_with_refreshed_keys_and_values_a_sample_depends_on_its_index_alone(
    sampler, params, order, monkeypatch
):
    """Recomputed every third step, and refreshed at two positions of a row at a time in between."""
    monkeypatch.setattr(orders, "REFRESH_CHUNK", 2)
    generate = generator(with_options(sampler, refresh_every=3, order=order))

    def sample(chosen):
        controls, chosen = CONTROLS._replace(decode_steps=7), jnp.array(chosen)
        return generate(params, jax.random.key(3), chosen, PROMPT[chosen], controls)

    every = sample([0, 1, 2, 3])
    assert (every.tokens < MASK).all() and len(np.unique(every.tokens, axis=0)) == 4
    np.testing.assert_array_equal(every.unmasked_at == -1, PROMPT != MASK)
    for chosen in ([3, 1, 0, 2], [2], [1, 3]):
        np.testing.assert_array_equal(sample(chosen).tokens, every.tokens[jnp.array(chosen)])


def test_refreshing_is_exact_with_one_layer_only(networks, process, random_parameters):
    """A single layer's keys and values depend on their own token alone.

    Even if they are never recomputed, the samples are exact. With two layers they are not.
    """
    prompt, z = jnp.full((16, LENGTH), MASK), jax.random.normal(jax.random.key(5), (16, 4, 6))
    controls = CONTROLS._replace(decode_steps=8)
    for layers in (1, 2):
        backbone = networks.decoder.backbone.clone(num_layers=layers, name=None)
        decoder = networks.decoder.clone(backbone=backbone, cross_layers=(0,))
        sampler = Sampler(dataclasses.replace(networks, decoder=decoder), SCHEDULE, process)
        params = {"decoder": random_parameters(decoder, prompt, z)}
        exact, refreshed = (
            jax.jit(with_options(sampler, refresh_every=every).decode_latents)(
                params, jax.random.key(0), jnp.arange(16), prompt, z, controls
            ).tokens
            for every in (1, 1_000)
        )
        assert bool((exact == refreshed).all()) == (layers == 1)


def without_block_1(tree):
    """Parameters with which the second block adds nothing to its input."""
    block, zeros = tree["block_1"], lambda part: jax.tree.map(jnp.zeros_like, part)
    attention = block["attention"] | {"out": zeros(block["attention"]["out"])}
    mlp = block["mlp"] | {"down": zeros(block["mlp"]["down"])}
    return tree | {"block_1": block | {"attention": attention, "mlp": mlp}}


@pytest.mark.parametrize(
    "order, given_latent",
    [("random", True), pytest.param("confidence", False, marks=pytest.mark.slow)],
)
def test_late_steps_leave_out_the_skipped_layers(
    networks, process, random_parameters, order, given_latent
):
    """Compared with a network whose layer adds nothing, because its outputs are zero.

    Skipped from the first step on, every token is that network's; from the end on, none is. From
    the middle on, the early steps' tokens are those of all layers, and some later ones are not.
    """
    prompt, z = jnp.full((16, LENGTH), MASK), jax.random.normal(jax.random.key(5), (16, 4, 6))
    backbone = networks.denoiser.clone(num_layers=3)
    decoder = networks.decoder.clone(backbone=backbone.clone(name=None), cross_layers=(1,))
    changed = dataclasses.replace(networks, denoiser=backbone, decoder=decoder)
    params = {
        "denoiser": random_parameters(changed.denoiser, prompt),
        "decoder": random_parameters(changed.decoder, prompt, z),
    }
    emptied = {
        "denoiser": without_block_1(params["denoiser"]),
        "decoder": params["decoder"] | {"backbone": without_block_1(params["decoder"]["backbone"])},
    }

    def decode(params, rows=slice(None), **skip):
        options = SamplingOptions(order=order, **skip)
        latents = z[rows] if given_latent else None
        keys, controls = (
            jax.random.split(jax.random.key(0), 16),
            CONTROLS._replace(decode_steps=8),
        )
        decode = jax.jit(Sampler(changed, SCHEDULE, process, options).decode)
        return decode(params, keys[rows], prompt[rows], latents, controls)

    every, fewer = decode(params), decode(emptied)
    assert (every.tokens != fewer.tokens).any()
    for skip_from, expected in ((0.0, fewer), (1.0, every)):
        found = decode(params, skip_layers=(1,), skip_from=skip_from)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
    half = decode(params, skip_layers=(1,), skip_from=0.5)
    early = half.unmasked_at < 4
    assert early.any()
    np.testing.assert_array_equal(half.tokens[early], every.tokens[early])
    assert (half.tokens[~early] != every.tokens[~early]).any()
    part = decode(params, slice(5, 8), skip_layers=(1,))  # independent of the batch
    np.testing.assert_array_equal(part.tokens, half.tokens[5:8])


def largest_logits(jaxpr, found=0):
    """Size of the largest array over the vocabulary in a traced program and its loop bodies."""
    for equation in jaxpr.eqns:
        shapes = [getattr(v.aval, "shape", ()) for v in equation.outvars]
        found = max([found, *(int(np.prod(shape)) for shape in shapes if VOCAB in shape)])
        for inner in core.jaxprs_in_params(equation.params):
            found = max(found, largest_logits(inner))
    return found


def test_logits_of_all_positions_never_exist(sampler, networks, params):
    """No array of B L V elements or more, in a program that the search is able to find them in."""
    size = 64
    prompt = jnp.full((size, LENGTH), MASK)
    for source in (None, StudentLatents()):
        traced = jax.make_jaxpr(
            lambda p, source=source: sampler.generate(
                source, p, jax.random.key(0), jnp.arange(size), prompt, CONTROLS
            )
        )(params)
        assert 0 < largest_logits(traced.jaxpr) < size * LENGTH * VOCAB
    apply = lambda p: networks.denoiser.apply({"params": p}, prompt)
    every = jax.make_jaxpr(apply)(params["denoiser"])
    assert largest_logits(every.jaxpr) == size * LENGTH * VOCAB


def test_other_controls_do_not_recompile(sampler, params):
    """Steps, temperature, nucleus and gamma are run-time values."""
    generate = generator(sampler)
    for controls in (CONTROLS, Controls(5, 1, 0.0, 1.0, 0.0, 0.9)):
        generate(params, jax.random.key(0), jnp.arange(4), PROMPT, controls)
    assert generate._cache_size() == 1


def test_the_decoder_reads_the_latent(sampler, params):
    """Greedy texts of two latents differ; those of one latent do not depend on the key."""
    greedy = CONTROLS._replace(temperature=0.0, decode_steps=1)
    decode = jax.jit(
        lambda key, z: sampler.decode_latents(params, key, jnp.arange(4), PROMPT, z, greedy)
    )
    z = 3 * jax.random.normal(jax.random.key(1), (2, 4, 4, 6))
    first = decode(jax.random.key(0), z[0]).tokens
    np.testing.assert_array_equal(decode(jax.random.key(9), z[0]).tokens, first)
    assert (decode(jax.random.key(0), z[1]).tokens != first).any()


def test_null_latents_are_standard_normal(sampler):
    """Mean and standard deviation within five deviations."""
    z = NullLatents()(sampler, {}, jax.random.split(jax.random.key(0), 50), CONTROLS)
    assert z.shape == (50, 4, 6)
    assert abs(z.mean()) < 5 / np.sqrt(z.size) and abs(z.std() - 1) < 5 / np.sqrt(2 * z.size)


def test_an_undistilled_student_samples_as_ddim(networks, process, params):
    """A student equal to the teacher takes the teacher's DDIM steps with current self-conditioning.

    In the rotation form, without an interval embedding, and without noise.
    """
    interval = jax.tree.map(jnp.zeros_like, params["student"]["interval_time"])
    student = params["teacher"] | {"interval_time": interval}
    sampler = Sampler(networks, SCHEDULE, process, step_form="rotation")
    keys = jax.random.split(jax.random.key(2), 3)
    controls = CONTROLS._replace(gamma=0.0, latent_steps=4)
    z = jax.jit(lambda p: StudentLatents()(sampler, p, keys, controls))({"student": student})
    # The student splits its keys, the prior does not; so both start from the same noise.
    start = jax.vmap(lambda k: jax.random.split(k)[0])(keys)
    prior = PriorLatents("ddim", "current")
    expected = jax.jit(lambda p: prior(sampler, p, start, controls))(params)
    np.testing.assert_allclose(z, expected, rtol=1e-3, atol=1e-3)


def test_the_student_reads_the_interval(sampler, networks, params):
    """Two jumps with gamma = 0 in plain code: u comes from the prediction at (z_t, t, t - r).

    Self-conditioning is the prediction at interval 0.
    """
    keys, controls = jax.random.split(jax.random.key(6), 3), CONTROLS._replace(gamma=0.0)
    found = jax.jit(lambda p: StudentLatents()(sampler, p, keys, controls))(params)
    predict = jax.jit(
        lambda *inputs: networks.student.apply({"params": params["student"]}, *inputs)
    )
    z = normal_per_sample(jax.vmap(lambda k: jax.random.split(k)[0])(keys), (4, 6))
    for t, r in ((1.0, 0.5), (0.5, 0.0)):
        t, gap = jnp.full(3, t), jnp.full(3, t - r)
        clean = predict(z, t, predict(z, t, None, jnp.zeros(3)), gap)
        z = z - gap[:, None, None] * velocity_of_clean(SCHEDULE, z, clean, t)
    np.testing.assert_allclose(found, z, rtol=1e-3, atol=1e-3)


def test_a_prior_takes_from_the_settings_what_it_does_not_name():
    """Bound sources are equal exactly if they sample alike, and then share a compiled program."""
    options = SamplingOptions(prior_method="ddim")
    assert PriorLatents().bind(options) == PriorLatents("ddim", "previous").bind(options)
    assert PriorLatents("euler").bind(options) == PriorLatents("euler", "previous")
    assert StudentLatents().bind(options) == StudentLatents()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(refresh_every=2, order="confidence"), "refresh_every: got 2, expected 1"),
        (dict(refresh_every=2, skip_layers=(0,)), "skip_layers: got (0,), expected empty"),
        (dict(order="threshold", skip_layers=(0,)), "skip_layers: got (0,), expected empty"),
        (dict(order="backwards"), "order: got 'backwards', expected one of random, count"),
    ],
    ids=str,
)
def test_invalid_combinations_of_settings_are_rejected(options, words):
    """An approximation is never ignored silently."""
    with pytest.raises(OptionError) as error:
        SamplingOptions(**options)
    assert words in str(error.value)
