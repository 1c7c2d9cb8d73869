"""A trained model as a library user calls it, on eight devices."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diladiff_jax as dl
from diladiff_jax.data import DataOptions, load_prepared
from diladiff_jax.parallel import sharding
from diladiff_jax.sampling.latent_sources import StudentLatents


@pytest.fixture(scope="module")
def model(trained):
    return dl.load(trained)


@pytest.fixture(scope="module")
def rows(model, trained):
    """Training text, 256 rows of tokens."""
    prepared = load_prepared(DataOptions.of(model.config.data), trained)
    return np.stack(prepared.rows("train").__getitems__(range(256)))


# Sampling.


def test_samples_do_not_depend_on_batch_or_devices(trained, model):
    """Sample i of a key is the same alone, in any batch, and on one device or eight."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    one_device = dl.load(trained, mesh=mesh)
    for name in ("mdlm", "ladiff", "diladiff"):
        eight = model.sample(5, 11, model=name, decode_steps=3)
        alone = one_device.sample(5, 4, model=name, decode_steps=3, batch=3, start=6)
        assert eight.tokens.shape == (11, 32) and len(eight.texts) == 11
        np.testing.assert_array_equal(eight.tokens[6:10], alone.tokens)
        if name != "mdlm":
            assert eight.latents.shape == (11, 4, 8)
            np.testing.assert_allclose(eight.latents[6:10], alone.latents, rtol=1e-4, atol=1e-5)
    assert not np.array_equal(eight.tokens, model.sample(6, 11, decode_steps=3).tokens)


def test_a_stream_gives_the_samples_batch_by_batch(model):
    """Of twenty samples in batches of eight the last batch is cut; a later start continues."""
    every = model.sample(5, 20, batch=8, decode_steps=3)
    parts = list(model.stream(5, 20, batch=8, decode_steps=3))
    assert [len(part.texts) for part in parts] == [8, 8, 4] == [len(part.latents) for part in parts]
    np.testing.assert_array_equal(np.concatenate([part.tokens for part in parts]), every.tokens)
    (rest,) = model.stream(5, 7, batch=8, start=13, decode_steps=3)
    np.testing.assert_array_equal(rest.tokens, every.tokens[13:])
    (filled,) = model.stream(5, 3, batch=8, decode_steps=3, prompt="Mia went to the [MASK]")
    assert all(text.startswith("Mia went to the") for text in filled.texts)


def test_samples_contain_only_text(model):
    """Every position is filled, with ids that can be sampled, in one of the steps."""
    sample = model.sample(0, 16, decode_steps=3, top_p=1.0, temperature=1.5)
    assert model.tokenizer.sampleable[sample.tokens].all()
    assert set(np.unique(sample.unmasked_at)) <= {0, 1, 2}


def test_the_score_is_the_scorers_nll_per_token_of_text(model):
    """Up to the end-of-text that closes it. The samples are those without the score."""
    plain = model.sample(5, 10, decode_steps=3)
    scored = model.sample(5, 10, decode_steps=3, score=True)
    np.testing.assert_array_equal(plain.tokens, scored.tokens)
    assert plain.nll is None and scored.nll.shape == (10,)
    assert np.isfinite(scored.nll).all() and len(np.unique(scored.nll)) > 1
    t, network = model.tokenizer, model.networks.scorer
    shifted = np.concatenate([np.full((10, 1), t.eot_id), scored.tokens[:, :-1]], axis=1)
    logits = network.apply({"params": model.trained("scorer")}, shifted)
    log_p = jax.nn.log_softmax(np.where(t.sampleable, logits, -np.inf), axis=-1)
    for row, p, nll in zip(scored.tokens, log_p, scored.nll, strict=True):
        padding = [False, *((row[1:] == t.eot_id) & (row[:-1] == t.eot_id))]
        kept = [i for i in range(len(row)) if not padding[i]]
        np.testing.assert_allclose(nll, -np.mean([p[i, row[i]] for i in kept]), rtol=1e-4)
    parts = list(model.stream(5, 10, batch=8, decode_steps=3, score=True))
    np.testing.assert_allclose(np.concatenate([part.nll for part in parts]), scored.nll, rtol=1e-4)
    assert model.decode(1, scored.latents, decode_steps=3, score=True).nll.shape == (10,)


def test_infilling_keeps_what_is_given(model):
    """In words or tokens: each [MASK] is one token, and everything after the text is free."""
    text = "Mia went to the [MASK] and found"
    sample = model.infill(3, [text, text], decode_steps=4)
    given = model.prompt_tokens(text)[0]
    fixed = given != model.tokenizer.mask_id
    assert (~fixed).sum() == 32 - 6
    assert (sample.tokens[:, fixed] == given[fixed]).all()
    assert (sample.unmasked_at[:, fixed] == -1).all()
    assert model.tokenizer.sampleable[sample.tokens].all()
    by_tokens = model.infill(3, np.stack([given, given]), decode_steps=4)
    np.testing.assert_array_equal(by_tokens.tokens, sample.tokens)


# Latents.


def test_encoded_text_is_standardized(model, rows):
    """Mean about 0 and deviation about 1 after a few steps of training, in any batch."""
    z = np.asarray(model.encode(rows))
    assert z.shape == (256, 4, 8) and abs(z.mean()) < 0.5 and 0.3 < z.std() < 3.0
    np.testing.assert_allclose(model.encode(rows[:11], batch=8), z[:11], rtol=1e-4, atol=1e-4)


def test_texts_encode_as_their_tokens(model, rows):
    """Several texts, or one."""
    z, texts = model.encode(rows[:3]), [model.tokenizer.decode(row) for row in rows[:3]]
    np.testing.assert_allclose(model.encode(texts), z, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model.encode(texts[1]), z[1:2], rtol=1e-4, atol=1e-4)


def test_latents_of_another_shape_are_rejected(model, rows):
    """The right ones decode to one text each."""
    z = model.encode(rows[:5])
    assert model.decode(np.int64(0), z, decode_steps=2).tokens.shape == (5, 32)
    with pytest.raises(ValueError, match=r"latents: got shape \(5, 3, 8\), expected \[B, 4, 8\]"):
        model.decode(0, z[:, :3])


# Programs.


def test_models_that_sample_alike_share_a_compiled_program(model):
    """The long control is the MDLM with other parameters.

    The undistilled prior is LaDiff if its solver is the config's.
    """
    assert model.program("mdlm_long") is model.program("mdlm")
    assert model.program(f"prior_{model.config.sampling.prior_method}") is model.program("ladiff")
    assert model.program("prior_dpmpp_2m") is not model.program("ladiff")
    assert model.program("autoregressive") is not model.program("mdlm")


def test_the_sampler_can_be_jitted_and_vmapped_by_its_caller(model):
    """It is a pure function of parameters and keys."""
    params, controls = model.parameters("diladiff"), model.controls(decode_steps=2)
    prompt = jnp.full((2, 32), model.tokenizer.mask_id, jnp.int32)

    def generate(key):
        indices, source = jnp.arange(2), StudentLatents()
        return model.sampler.generate(source, params, key, indices, prompt, controls).tokens

    keys = jax.random.split(jax.random.key(0), 3)
    many = jax.jit(jax.vmap(generate))(keys)
    np.testing.assert_array_equal(many[1], jax.jit(generate)(keys[1]))


# Invalid arguments.


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(model="gpt"), "model: got 'gpt', expected one of mdlm"),
        (dict(key="0"), "key: got '0', expected"),
        (dict(key=np.zeros(2, np.uint32)), "key: got array"),
        (dict(key=2**70), "expected a whole number of 64 bits"),
        (dict(num=0), "num: got 0, expected a whole number of at least 1"),
        (dict(num=-1), "num: got -1, expected"),
        (dict(batch=0), "batch: got 0, expected"),
        (dict(start=-1), "start: got -1, expected"),
        (dict(start="0"), "start: got '0', expected"),
        (dict(start=2**31 - 1, num=2), "start: got 2147483647, expected"),
        (dict(decode_steps=0), "decode_steps: got 0, expected"),
        (dict(decode_steps=2.5), "decode_steps: got 2.5, expected"),
        (dict(decode_steps="4"), "decode_steps: got '4', expected"),
        (dict(decode_steps=2**31), "decode_steps: got 2147483648, expected"),
        (dict(latent_steps=-1), "latent_steps: got -1, expected"),
        (dict(top_p=1.1), "top_p: got 1.1, expected between 0 and 1"),
        (dict(top_p="1"), "top_p: got '1', expected"),
        (dict(temperature=-0.1), "temperature: got -0.1, expected"),
        (dict(temperature=float("nan")), "temperature: got nan, expected between 0"),
        (dict(temperature=float("inf")), "temperature: got inf, expected between 0"),
        (dict(temperature=1e38), "temperature: got 1e+38, expected between 0"),
        (dict(temperature=1e39), "temperature: got 1e+39, expected between 0"),
        (dict(gamma=1 - 1e-12), "gamma: got 0.999999999999, expected in [0, 1"),
        (dict(gamma=1.0), "gamma: got 1.0, expected in [0, 1"),
        (dict(order="count"), "order: not an argument of a sampling call; sampling.order is"),
        (dict(bogus=1), "bogus: not an argument of a sampling call; expected one of decode_steps"),
    ],
)
def test_an_invalid_argument_of_a_sampling_call_is_named(model, given, words):
    """With its value and what would be valid, in one line."""
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        model.sample(**{"key": 0, "model": "mdlm"} | given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given", [dict(num=0), dict(num=2, batch=0), dict(num=2, prompt=["a"] * 2)]
)
def test_an_invalid_argument_of_a_stream_is_rejected(model, given):
    """Before anything is sampled."""
    with pytest.raises(ValueError):
        next(model.stream(5, **given))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "prompt: got no text"),
        (["Mia", ""], "prompt: got no text"),
        ("Mia " * 32, "tokens, expected at most 32"),
        ("[MASK] saw a [mask] kite", r"got '\[mask\]', expected \[MASK\]"),
        ("a <mask>", "got '<mask>', expected"),
        (np.zeros((2, 5), np.int32), r"of shape \(2, 5\), expected integers \[B, 32\]"),
        (np.full((1, 32), 10**6), "expected 0 to"),
    ],
    ids=["empty", "one empty", "long", "lower case", "other mask", "shape", "ids"],
)
def test_an_invalid_prompt_is_rejected(model, prompt, words):
    """One without text, too long, with a misspelt mask, or of other tokens."""
    with pytest.raises(ValueError, match=words):
        model.infill(0, prompt)


def test_a_prompt_must_leave_something_to_fill_in(model):
    """Masks alone are a valid prompt."""
    full = model.tokenizer.decode(model.tokenizer.encode("Mia " * 32)[:32])
    assert len(model.tokenizer.encode(full)) == 32
    with pytest.raises(ValueError, match="fills all 32 tokens"):
        model.prompt_tokens(full)
    assert (model.prompt_tokens("[MASK]" * 32) == model.tokenizer.mask_id).all()


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (np.zeros((2, 5), np.int32), r"of shape \(2, 5\), expected integers \[B, 32\]"),
        (np.full((1, 32), 10**6), "expected 0 to"),
        ([], "got no text"),
        ("the " * 40, "tokens, expected at most 32"),
    ],
    ids=["shape", "ids", "nothing", "long"],
)
def test_text_that_cannot_be_encoded_is_rejected(model, texts, words):
    """One line that says what would be valid."""
    with pytest.raises(ValueError, match=words):
        model.encode(texts)


# Workdirs.


def test_a_workdir_without_checkpoints_names_the_command_that_trains(tmp_path, trained):
    """It loads, and offers no model."""
    shutil.copy(trained / "config.json", tmp_path / "config.json")
    shutil.copytree(trained / "tokenizer", tmp_path / "tokenizer")
    empty = dl.load(tmp_path)
    assert empty.models == ()
    with pytest.raises(dl.CheckpointError, match=r"no trained model. Run launch/train.py"):
        empty.sample(0)
    with pytest.raises(dl.CheckpointError, match="stage mdlm_long is not trained"):
        empty.sample(0, model="mdlm_long")
    with pytest.raises(dl.ConfigError, match="does not exist"):
        dl.load(tmp_path / "nowhere")


def test_a_damaged_checkpoint_is_named(tmp_path, trained):
    """Truncated files give one line with the checkpoint's path."""
    shutil.copytree(trained, tmp_path / "w")
    steps = (tmp_path / "w" / "mdlm" / "checkpoints").iterdir()
    folder = max((path for path in steps if path.name.isdigit()), key=lambda path: int(path.name))
    for path in folder.rglob("*"):
        if path.is_file() and "ema" in path.parts and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(dl.CheckpointError, match="is damaged: ema/") as error:
        dl.load(tmp_path / "w").sample(0, model="mdlm")
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
