"""Generation as a whole, on tiny random networks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from diladiff_jax.diffusion.gaussian import TangentSchedule, velocity_of_clean
from diladiff_jax.sampling import latent, pipeline, tokens

LENGTH, VOCAB, MASK = 8, 12, 10


@pytest.fixture(scope="module")
def made(networks, sampleable, random_parameters):
    """A sampler, parameters for it, and its compiled `generate`."""
    tokens, z, t = jnp.zeros((1, LENGTH), jnp.int32), jnp.zeros((1, 4, 6)), jnp.zeros((1,))
    inputs = {
        "denoiser": (tokens,),
        "decoder": (tokens, z),
        "teacher": (z, t, z),
        "student": (z, t, z, t),
    }
    params = {
        name: random_parameters(getattr(networks, name), *inputs[name], seed=seed)
        for seed, name in enumerate(inputs)
    }
    sampler = pipeline.Sampler(networks, TangentSchedule(3.0), MASK, sampleable)
    return sampler, params, jax.jit(sampler.generate, static_argnums=0)


CONTROLS = pipeline.Controls(
    decode_steps=3, latent_steps=2, temperature=1.0, top_p=0.9, gamma=0.8, threshold=0.9
)
PROMPT = jnp.full((4, LENGTH), MASK).at[:, 2].set(7).at[1, 5].set(3)


@pytest.mark.parametrize("model", pipeline.MODELS)
def test_generation_fills_everything_keeps_the_prompt_and_depends_on_the_index_alone(made, model):
    """Only text ids, the prompt as given (step -1); sample i is the same in another batch and another order, and differs from its neighbours."""
    _, params, generate = made
    key, order = jax.random.key(3), jnp.array([3, 1, 0, 2])
    whole = generate(model, params, key, jnp.arange(4), PROMPT, CONTROLS)
    assert (whole.tokens < MASK).all()
    given = PROMPT != MASK
    np.testing.assert_array_equal(whole.tokens[given], PROMPT[given])
    np.testing.assert_array_equal(whole.unmasked_at == -1, given)
    assert (whole.unmasked_at < 3).all()
    other = generate(model, params, key, order, PROMPT[order], CONTROLS)
    np.testing.assert_array_equal(other.tokens, whole.tokens[order])
    assert len(np.unique(whole.tokens, axis=0)) == 4
    if whole.latents is None:
        assert model.startswith("mdlm")
    else:
        assert whole.latents.shape == (4, 4, 6) and np.isfinite(whole.latents).all()
        np.testing.assert_allclose(other.latents, whole.latents[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", pipeline.ORDERS[1:])
def test_other_orders_fill_everything_and_depend_on_the_index_alone(made, order):
    """As for random order; and the same sample in another batch."""
    sampler, params, _ = made
    generate = jax.jit(dataclasses.replace(sampler, order=order).generate, static_argnums=0)
    whole = generate("diladiff", params, jax.random.key(3), jnp.arange(4), PROMPT, CONTROLS)
    assert (whole.tokens < MASK).all()
    np.testing.assert_array_equal(whole.unmasked_at == -1, PROMPT != MASK)
    turned = jnp.array([3, 1, 0, 2])
    np.testing.assert_array_equal(
        generate("diladiff", params, jax.random.key(3), turned, PROMPT[turned], CONTROLS).tokens,
        whole.tokens[turned],
    )


@pytest.mark.parametrize("order", ["random", pytest.param("count", marks=pytest.mark.slow)])
def test_kept_keys_and_values_depend_on_the_index_alone(made, order, monkeypatch):
    """Made anew every third step, and between two positions of a row at a time: everything is filled, and a sample is the same in another batch and alone."""
    monkeypatch.setattr(tokens, "RENEWED", 2)
    sampler, params, _ = made
    generate = jax.jit(
        dataclasses.replace(sampler, refresh_every=3, order=order).generate, static_argnums=0
    )
    draw = lambda chosen: generate(
        "diladiff",
        params,
        jax.random.key(3),
        jnp.array(chosen),
        PROMPT[jnp.array(chosen)],
        CONTROLS._replace(decode_steps=7),
    )
    whole = draw([0, 1, 2, 3])
    assert (whole.tokens < MASK).all() and len(np.unique(whole.tokens, axis=0)) == 4
    np.testing.assert_array_equal(whole.unmasked_at == -1, PROMPT != MASK)
    for chosen in ([3, 1, 0, 2], [2], [1, 3]):
        np.testing.assert_array_equal(draw(chosen).tokens, whole.tokens[jnp.array(chosen)])


def test_one_layers_keys_and_values_lose_nothing_by_being_kept(
    networks, sampleable, random_parameters
):
    """They are made of a position's own token: never made anew, they give the very samples of the plain sampler. With two layers they do not."""
    prompt, z = jnp.full((16, LENGTH), MASK), jax.random.normal(jax.random.key(5), (16, 4, 6))
    controls = CONTROLS._replace(decode_steps=8)
    for layers in (1, 2):
        backbone = networks.decoder.backbone.clone(num_layers=layers, name=None)
        changed = dataclasses.replace(
            networks, decoder=networks.decoder.clone(backbone=backbone, cross_layers=(0,))
        )
        params = {"decoder": random_parameters(changed.decoder, prompt, z)}
        make = lambda every, networks=changed: pipeline.Sampler(
            networks, TangentSchedule(3.0), MASK, sampleable, refresh_every=every
        )
        exact, kept = (
            jax.jit(make(every).decode_latents)(
                params, jax.random.key(0), jnp.arange(16), prompt, z, controls
            ).tokens
            for every in (1, 1_000)
        )
        assert bool((exact == kept).all()) == (layers == 1)


@pytest.mark.parametrize("order, given_latent", [("random", True), ("confidence", False)])
def test_late_steps_are_those_of_the_network_without_the_layer(
    networks, sampleable, random_parameters, order, given_latent
):
    """Against a network whose layer adds nothing, its outputs being zero: without the layer from the first step on every token is that network's, from
    the last step's end on the whole network's. From the middle on, what the early steps unmask is the whole network's and not all of the rest is."""
    prompt, z = jnp.full((16, LENGTH), MASK), jax.random.normal(jax.random.key(5), (16, 4, 6))
    backbone = networks.denoiser.clone(num_layers=3)
    changed = dataclasses.replace(
        networks,
        denoiser=backbone,
        decoder=networks.decoder.clone(backbone=backbone.clone(name=None), cross_layers=(1,)),
    )
    params = {
        "denoiser": random_parameters(changed.denoiser, prompt),
        "decoder": random_parameters(changed.decoder, prompt, z),
    }

    def without(tree):
        block = tree["block_1"]
        out, down = (
            jax.tree.map(jnp.zeros_like, part)
            for part in (block["attention"]["out"], block["mlp"]["down"])
        )
        return tree | {
            "block_1": block
            | {"attention": block["attention"] | {"out": out}, "mlp": block["mlp"] | {"down": down}}
        }

    emptied = {
        "denoiser": without(params["denoiser"]),
        "decoder": params["decoder"] | {"backbone": without(params["decoder"]["backbone"])},
    }

    def decode(params, rows=slice(None), **skip):
        sampler = pipeline.Sampler(
            changed, TangentSchedule(3.0), MASK, sampleable, order=order, **skip
        )
        keys = jax.random.split(jax.random.key(0), 16)
        return jax.jit(sampler.decode)(
            params,
            keys[rows],
            prompt[rows],
            z[rows] if given_latent else None,
            CONTROLS._replace(decode_steps=8),
        )

    whole, less = decode(params), decode(emptied)
    assert (whole.tokens != less.tokens).any()
    np.testing.assert_array_equal(
        decode(params, skip_layers=(1,), skip_from=0.0).tokens, less.tokens
    )
    np.testing.assert_array_equal(
        decode(params, skip_layers=(1,), skip_from=1.0).tokens, whole.tokens
    )
    half = decode(params, skip_layers=(1,), skip_from=0.5)
    early = half.unmasked_at < 4
    assert early.any()
    np.testing.assert_array_equal(half.tokens[early], whole.tokens[early])
    assert (half.tokens[~early] != whole.tokens[~early]).any()
    np.testing.assert_array_equal(
        decode(params, slice(5, 8), skip_layers=(1,)).tokens, half.tokens[5:8]
    )  # whatever the batch


def test_logits_of_all_positions_never_exist(made, networks, sampleable):
    """No array of B L V elements or more in the whole traced program, whose loop bodies are searched too."""
    sampler, params, _ = made
    size = 64
    prompt = jnp.full((size, LENGTH), MASK)

    def largest(jaxpr, found=0):
        for equation in jaxpr.eqns:
            shapes = [
                v.aval.shape
                for v in equation.outvars
                if hasattr(v.aval, "shape") and VOCAB in v.aval.shape
            ]
            found = max([found, *(int(np.prod(shape)) for shape in shapes)])
            for inner in core.jaxprs_in_params(equation.params):
                found = max(found, largest(inner))
        return found

    for model in ("mdlm", "diladiff"):
        traced = jax.make_jaxpr(
            lambda p: sampler.generate(
                model, p, jax.random.key(0), jnp.arange(size), prompt, CONTROLS
            )
        )(params)
        assert 0 < largest(traced.jaxpr) < size * LENGTH * VOCAB
    whole = jax.make_jaxpr(lambda p: networks.denoiser.apply({"params": p}, prompt))(
        params["denoiser"]
    )
    assert largest(whole.jaxpr) == size * LENGTH * VOCAB


def test_run_time_controls_do_not_compile_anew(made):
    """Steps, temperature, nucleus and gamma change the draw, not the program."""
    sampler, params, _ = made
    generate = jax.jit(
        lambda p, c: sampler.generate("diladiff", p, jax.random.key(0), jnp.arange(4), PROMPT, c)
    )
    for controls in (CONTROLS, pipeline.Controls(5, 1, 0.0, 1.0, 0.0, 0.9)):
        generate(params, controls)
    assert generate._cache_size() == 1


def test_latents_reach_the_text(made):
    """The decoder reads the latent: greedy decoding of two latents differs, of the same latent does not; the null control draws N(0, I)."""
    sampler, params, _ = made
    greedy = CONTROLS._replace(temperature=0.0, decode_steps=1)
    decode = jax.jit(
        lambda key, z: sampler.decode_latents(params, key, jnp.arange(4), PROMPT, z, greedy)
    )
    z = 3 * jax.random.normal(jax.random.key(1), (2, 4, 4, 6))
    first = decode(jax.random.key(0), z[0]).tokens
    np.testing.assert_array_equal(decode(jax.random.key(9), z[0]).tokens, first)
    assert (decode(jax.random.key(0), z[1]).tokens != first).any()
    null = sampler.decode_noise(params, jax.random.key(0), jnp.arange(4), PROMPT, CONTROLS).latents
    assert abs(null.mean()) < 5 / np.sqrt(null.size) and abs(null.std() - 1) < 5 / np.sqrt(
        2 * null.size
    )


def test_the_students_latents_are_its_own_few_step_law(made, networks):
    """Before distillation (student = teacher, no interval embedding) rotation steps without noise are the teacher's DDIM with current self-conditioning."""
    _, params, _ = made
    interval = {
        k: jax.tree.map(jnp.zeros_like, v)
        for k, v in params["student"].items()
        if k == "interval_time"
    }
    student = params["teacher"] | interval
    make = lambda **kw: pipeline.Sampler(
        networks, TangentSchedule(3.0), MASK, np.arange(VOCAB) < MASK, **kw
    )
    keys = jax.random.split(jax.random.key(2), 3)
    controls = CONTROLS._replace(gamma=0.0, latent_steps=4)
    z = jax.jit(make(step_form="rotation").student_latents)({"student": student}, keys, controls)

    # The same start: the student splits its key, the prior does not.
    start = jax.vmap(lambda k: jax.random.split(k)[0])(keys)
    prior = make(prior_method="ddim", prior_self_conditioning="current")
    np.testing.assert_allclose(
        z, jax.jit(prior.prior_latents)(params, start, controls), rtol=1e-3, atol=1e-3
    )


def test_the_student_is_told_the_interval(made, networks):
    """Two jumps by hand, gamma = 0: u from the network's prediction at (z_t, t, t - r), self-conditioned at interval 0."""
    sampler, params, _ = made
    keys = jax.random.split(jax.random.key(6), 3)
    found = jax.jit(sampler.student_latents)(params, keys, CONTROLS._replace(gamma=0.0))
    predict = jax.jit(
        lambda *inputs: networks.student.apply({"params": params["student"]}, *inputs)
    )
    z = latent.normal_per_sample(jax.vmap(lambda k: jax.random.split(k)[0])(keys), (4, 6))
    for t, r in ((1.0, 0.5), (0.5, 0.0)):
        t, gap = jnp.full(3, t), jnp.full(3, t - r)
        clean = predict(z, t, predict(z, t, None, jnp.zeros(3)), gap)
        z = z - gap[:, None, None] * velocity_of_clean(sampler.schedule, z, clean, t)
    np.testing.assert_allclose(found, z, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        dict(refresh_every=2, order="confidence"),
        dict(refresh_every=2, skip_layers=(0,)),
        dict(order="threshold", skip_layers=(0,)),
    ],
    ids=str,
)
def test_approximations_that_exclude_each_other_are_refused(made, settings):
    """None of two is left out silently."""
    with pytest.raises(ValueError, match="it must be"):
        dataclasses.replace(made[0], **settings)


def test_unknown_model_is_refused(made):
    """With the names that are known."""
    sampler, params, _ = made
    with pytest.raises(ValueError, match="diladiff"):
        sampler.generate("gpt", params, jax.random.key(0), jnp.arange(4), PROMPT, CONTROLS)
