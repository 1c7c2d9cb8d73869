"""Results do not depend on JAX's global settings, on the kind of a key, or on a checker."""

import copy
import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diladiff_jax as dl
from diladiff_jax import arguments, jax_settings
from diladiff_jax.jax_settings import PRNG, as_random_key, pinned, random_key
from diladiff_jax.parallel import sharding
from diladiff_jax.sampling import categorical

SETTINGS = {
    "the generator rbg": lambda: jax.default_prng_impl("rbg"),
    "the generator unsafe_rbg": lambda: jax.default_prng_impl("unsafe_rbg"),
    "64 bits": lambda: jax.enable_x64(True),
    "another splitting of keys": lambda: jax.threefry_partitionable(False),
    "strict promotion of types": lambda: jax.numpy_dtype_promotion("strict"),
    "the checker of reused keys": lambda: jax.debug_key_reuse(True),
    "a mesh": lambda: jax.set_mesh(jax.make_mesh((1,), ("x",))),
    "a mesh of all devices": lambda: jax.set_mesh(jax.make_mesh((8,), ("data",))),
    "an old-style mesh": lambda: jax.make_mesh((2, 4), ("x", "y")),
    "a default device": lambda: jax.default_device(jax.devices()[3]),
    "the checker of tracers": lambda: jax.check_tracer_leaks(True),
    "the checker of NaN": lambda: jax.debug_nans(True),
}


@pytest.fixture(scope="module")
def model(trained):
    return dl.load(trained)


def sampled(opened, **options):
    return opened.sample(3, 8, decode_steps=2, **options)


@pytest.fixture(scope="module")
def expected(model):
    return {name: sampled(model, model=name) for name in ("mdlm", "ladiff", "diladiff")}


@pytest.mark.parametrize("setting", SETTINGS)
def test_samples_and_latents_do_not_depend_on_global_settings(model, trained, expected, setting):
    """Loading, sampling and encoding under each setting of the caller."""
    texts = ["Mia went home.", "Tom has a kite."] * 4
    latents = np.asarray(model.encode(texts))
    with SETTINGS[setting]():
        fresh = dl.load(trained)
        for name in expected if setting == "64 bits" else ("diladiff",):
            found = sampled(fresh, model=name).tokens
            np.testing.assert_array_equal(found, expected[name].tokens)
        encoded = fresh.encode(texts)
        assert encoded.dtype == jnp.float32
        np.testing.assert_allclose(encoded, latents, rtol=1e-5, atol=1e-5)


def test_a_callers_settings_survive_a_call(model):
    """Nothing of what the library pins leaks into the caller's program."""
    mesh = jax.make_mesh((1,), ("x",))
    with jax.set_mesh(mesh), jax.enable_x64(True), jax.default_prng_impl("rbg"):
        stream = model.stream(3, 16, batch=8, model="mdlm", decode_steps=2)
        next(stream)
        assert jnp.arange(2.0).dtype == jnp.float64
        assert jax.random.PRNGKey(0).shape == (4,)
        assert jax.sharding.get_mesh() == mesh


@pytest.mark.parametrize(
    "key",
    [
        jax.random.PRNGKey(3),
        jax.random.key(3, impl="rbg"),
        jax.random.PRNGKey(3, impl="rbg"),
        jax.random.key(3, impl="unsafe_rbg"),
    ],
    ids=["old-style", "rbg", "old-style rbg", "unsafe_rbg"],
)
def test_a_key_of_any_kind_gives_samples_by_key_and_index(model, key):
    """Not by batch, start or number; the old-style key of threefry is the new-style one."""
    whole = model.sample(key, 8, model="mdlm", decode_steps=2, batch=8)
    rest = model.sample(key, 1, model="mdlm", decode_steps=2, batch=2, start=5)
    np.testing.assert_array_equal(rest.tokens[0], whole.tokens[5])
    if np.shape(key) == (2,):
        seeded = model.sample(3, 8, model="mdlm", decode_steps=2)
        np.testing.assert_array_equal(whole.tokens, seeded.tokens)


@pytest.mark.parametrize(
    "key",
    [
        jnp.zeros(3, jnp.uint32),
        jnp.zeros((2, 2), jnp.uint32),
        jnp.zeros(0, jnp.uint32),
        jnp.zeros(2, jnp.int32),
        np.zeros(2, np.uint32),
        2.5,
        jax.random.split(jax.random.key(0)),
    ],
    ids=["3 words", "2 keys", "no word", "int32", "a key in NumPy", "a float", "new-style keys"],
)
def test_what_is_no_key_is_rejected(key):
    """In one line, before anything is compiled."""
    with pytest.raises(ValueError, match=r"^key: got .*expected a whole number or one key"):
        arguments.sampling_key(key)


def test_seeds_of_64_bits_have_keys_of_their_own():
    """Small seeds have JAX's own keys. Seeds above 32 bits and negative ones are not cut."""
    data = [
        tuple(np.asarray(jax.random.key_data(random_key(seed))).tolist())
        for seed in (5, 2**32 + 5, -5, 2**63 - 1, -(2**63))
    ]
    assert data[0] == tuple(np.asarray(jax.random.key_data(jax.random.key(5, impl=PRNG))).tolist())
    assert len(set(data)) == 5
    with jax.enable_x64(True), jax.default_prng_impl("rbg"):
        again = tuple(np.asarray(jax.random.key_data(random_key(-5))).tolist())
    assert again == data[2]


@pytest.mark.parametrize("setting", [*SETTINGS][:4])
def test_the_pure_functions_state_their_types(setting):
    """Draws of the samplers' own functions under a caller's `jit`, without a `Model`."""
    key, indices = jax.random.key(3, impl=PRNG), np.arange(4, dtype=np.int32)

    def draws(key, indices):
        keys = categorical.sample_keys(key, indices)
        first, second = categorical.split_per_sample(keys)
        return (
            categorical.uniform_per_sample(first, (3,)),
            categorical.normal_per_sample(categorical.fold_in_per_sample(second, 1), (3,)),
        )

    expected = draws(key, indices)
    with SETTINGS[setting]():
        found = jax.jit(draws)(key, indices)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == jnp.float32
            if setting != "another splitting of keys":  # that changes JAX's own functions
                np.testing.assert_array_equal(ours, theirs)


def test_converted_keys_do_not_depend_on_the_batch():
    """`sample_keys` of an rbg key, as a caller of the pure functions may pass it."""
    for key in (jax.random.key(3, impl="rbg"), jax.random.PRNGKey(3)):
        many = categorical.sample_keys(key, jnp.arange(8))
        one = categorical.sample_keys(key, jnp.arange(5, 6))
        np.testing.assert_array_equal(
            categorical.uniform_per_sample(many, (4,))[5:6],
            categorical.uniform_per_sample(one, (4,)),
        )
    assert as_random_key(jax.random.key(1, impl=PRNG)).dtype == random_key(1).dtype


def test_a_process_can_be_pinned_as_commands_do():
    """Environment variables of JAX do not reach the draws of a command."""
    script = (
        "import jax, jax.numpy as jnp, numpy as np\n"
        "from diladiff_jax.jax_settings import pin_process, random_key\n"
        "pin_process()\n"
        "print(jax.random.key(0).dtype, jnp.arange(2.0).dtype, "
        "np.asarray(jax.random.bits(random_key(7), (2,))).tolist())\n"
    )
    changed = {
        "JAX_DEFAULT_PRNG_IMPL": "rbg",
        "JAX_ENABLE_X64": "1",
        "JAX_THREEFRY_PARTITIONABLE": "0",
        "JAX_RANDOM_SEED_OFFSET": "9",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    }
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | extra,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for extra in ({}, changed)
    }
    assert len(outputs) == 1 and "float32" in outputs.pop()


def test_a_model_pickles_as_its_workdir_and_settings(model, expected):
    """Also copies; parameters are read again. A mesh of the caller's cannot travel."""
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), copy.copy(model)):
        assert other.config == model.config and other is not model
    coarse = dl.load(model.experiment.workdir, compute_dtype="bfloat16")
    assert pickle.loads(pickle.dumps(coarse)).experiment.compute_dtype == "bfloat16"
    found = sampled(pickle.loads(pickle.dumps(model)), model="mdlm")
    np.testing.assert_array_equal(found.tokens, expected["mdlm"].tokens)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    alone = dl.load(model.experiment.workdir, mesh=mesh)
    with pytest.raises(TypeError, match=r"mesh=\.\.\. cannot be pickled.*dl\.load"):
        pickle.dumps(alone)


def test_every_pinned_setting_is_one_of_jax():
    """A version of JAX that renames one must fail here and not at a user's."""
    with pinned():
        for name, value in jax_settings._PINNED.items():
            assert jax.config.values[name] is not None
            assert getattr(jax.config, name) == value
