"""The library's calls on a trained workdir, on eight devices."""

import re

import jax
import numpy as np
import pytest

import diladiff_jax as dl
from diladiff_jax.parallel import sharding


@pytest.fixture(scope="module")
def model(trained):
    return dl.load(trained)


def test_samples_do_not_depend_on_batch_or_devices(trained, model):
    """Sample i of a key is the same alone, in any batch, and on one device or eight."""
    one_device = dl.load(
        trained, mesh=sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    )
    for name in ("mdlm", "ladiff", "diladiff"):
        eight = model.sample(5, 11, model=name, decode_steps=3)
        alone = one_device.sample(5, 4, model=name, decode_steps=3, batch=3, start=6)
        assert eight.tokens.shape == (11, 32) and len(eight.texts) == 11
        np.testing.assert_array_equal(eight.tokens[6:10], alone.tokens)
        if name != "mdlm":
            assert eight.latents.shape == (11, 4, 8)
            np.testing.assert_allclose(eight.latents[6:10], alone.latents, rtol=1e-4, atol=1e-5)
    assert not np.array_equal(eight.tokens, model.sample(6, 11, decode_steps=3).tokens)


def test_a_stream_is_the_sample_in_parts(model):
    """Batches of eight of twenty samples, the last one cut: together what `sample` draws at once, and a later start goes on where it stopped."""
    whole = model.sample(5, 20, batch=8, decode_steps=3)
    parts = list(model.stream(5, 20, batch=8, decode_steps=3))
    assert [len(part.texts) for part in parts] == [8, 8, 4] == [len(part.latents) for part in parts]
    np.testing.assert_array_equal(np.concatenate([part.tokens for part in parts]), whole.tokens)
    (rest,) = model.stream(5, 7, batch=8, start=13, decode_steps=3)
    np.testing.assert_array_equal(rest.tokens, whole.tokens[13:])
    (filled,) = model.stream(5, 3, batch=8, decode_steps=3, prompt="Mia went to the [MASK]")
    assert all(text.startswith("Mia went to the") for text in filled.texts)
    for wrong in (dict(num=0), dict(num=2, batch=0), dict(num=2, prompt=["a", "b"])):
        with pytest.raises(ValueError):
            next(model.stream(5, **wrong))


def test_samples_hold_only_text(model):
    """Every position is filled, with ids that may be sampled, in one of the steps."""
    drawn = model.sample(0, 16, decode_steps=3, top_p=1.0, temperature=1.5)
    assert model.tokenizer.sampleable[drawn.tokens].all()
    assert set(np.unique(drawn.unmasked_at)) <= {0, 1, 2}


def test_a_sample_is_scored_in_the_same_program(model):
    """Nats a token up to the end-of-text that closes it, as the scorer gives them to the finished tokens; drawing is not changed by it, nor by the fill."""
    plain, scored = (
        model.sample(5, 10, decode_steps=3),
        model.sample(5, 10, decode_steps=3, score=True),
    )
    np.testing.assert_array_equal(plain.tokens, scored.tokens)
    assert plain.nll is None and scored.nll.shape == (10,)
    t, network = model.tokenizer, model.networks.scorer
    assert np.isfinite(scored.nll).all() and len(np.unique(scored.nll)) > 1
    logits = network.apply(
        {"params": model.trained("scorer")},
        np.concatenate([np.full((10, 1), t.eot_id), scored.tokens[:, :-1]], axis=1),
    )
    log_p = jax.nn.log_softmax(np.where(t.sampleable, logits, -np.inf), axis=-1)
    for row, p, nll in zip(scored.tokens, log_p, scored.nll, strict=True):
        kept = [
            i for i in range(len(row)) if i == 0 or (row[i - 1], row[i]) != (t.eot_id, t.eot_id)
        ]
        np.testing.assert_allclose(nll, -np.mean([p[i, row[i]] for i in kept]), rtol=1e-4)
    parts = list(model.stream(5, 10, batch=8, decode_steps=3, score=True))
    np.testing.assert_allclose(np.concatenate([part.nll for part in parts]), scored.nll, rtol=1e-4)
    latents = model.decode(1, scored.latents, decode_steps=3, score=True)
    assert latents.nll.shape == (10,)


def test_infill_holds_what_is_given(model):
    """Prompts in words or tokens: given positions stay, each [MASK] is one token, the rest is free."""
    text = "Mia went to the [MASK] and found"
    drawn = model.infill(3, [text, text], decode_steps=4)
    given = model.prompt_tokens(text)[0]
    fixed = given != model.tokenizer.mask_id
    assert (given == model.tokenizer.mask_id).sum() == 32 - 6
    assert (drawn.tokens[:, fixed] == given[fixed]).all() and (
        drawn.unmasked_at[:, fixed] == -1
    ).all()
    assert model.tokenizer.sampleable[drawn.tokens].all()
    by_tokens = model.infill(3, np.stack([given, given]), decode_steps=4)
    np.testing.assert_array_equal(by_tokens.tokens, drawn.tokens)
    with pytest.raises(ValueError, match="the model holds 32"):
        model.infill(0, "the " * 40)
    with pytest.raises(ValueError, match=r"shape \[B, 32\]"):
        model.infill(0, np.zeros((2, 5), np.int32))
    with pytest.raises(ValueError, match="ids go from 0"):
        model.infill(0, np.full((1, 32), 10**6))


def test_encode_is_standardized_and_decode_takes_it(model, trained):
    """Latents of training text have the frozen statistics' mean 0 and deviation 1, roughly, after few steps; decode reads them."""
    from diladiff_jax.data import DataOptions, load_prepared

    rows = np.stack(
        load_prepared(DataOptions.of(model.config.data), trained)
        .rows("train")
        .__getitems__(range(256))
    )
    z = np.asarray(model.encode(rows))
    assert z.shape == (256, 4, 8) and abs(z.mean()) < 0.5 and 0.3 < z.std() < 3.0
    texts = [model.tokenizer.decode(row) for row in rows[:3]]
    np.testing.assert_allclose(model.encode(texts), z[:3], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        model.encode(texts[1]), z[1:2], rtol=1e-4, atol=1e-4
    )  # one text, as `infill` takes one
    np.testing.assert_allclose(model.encode(rows[:11], batch=8), z[:11], rtol=1e-4, atol=1e-4)
    for wrong, words in (
        (rows[:, :5], r"shape \[B, 32\]"),
        (rows + 10**6, "ids go from 0"),
        ([], "nothing is given"),
    ):
        with pytest.raises(ValueError, match=words):
            model.encode(wrong)
    with pytest.raises(ValueError, match="64 bits"):
        model.sample(2**70)
    again = model.decode(np.int64(0), z[:5], decode_steps=2)
    assert again.tokens.shape == (5, 32)
    with pytest.raises(ValueError, match=r"it must be \[B, 4, 8\]"):
        model.decode(0, z[:, :3])


def test_what_draws_alike_is_compiled_once(model):
    """The long control is the MDLM with other parameters, and the prior under the config's own sampler is LaDiff; under another it isn't."""
    assert model.compiled("mdlm_long") is model.compiled("mdlm")
    assert model.compiled(f"prior_{model.config.sampling.prior_method}") is model.compiled("ladiff")
    assert model.compiled("prior_dpmpp_2m") is not model.compiled("ladiff")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(decode_steps=0), "decode_steps is 0"),
        (dict(latent_steps=-1), "latent_steps is -1"),
        (dict(top_p=1.1), "top_p is 1.1"),
        (dict(temperature=-0.1), "temperature is -0.1"),
        (dict(gamma=1.0), "gamma is 1.0"),
        (dict(model="gpt"), "model is 'gpt'"),
        (dict(num=0), "num is 0"),
        (dict(num=-1), "num is -1"),
        (dict(batch=0), "batch is 0"),
        (dict(start=-1), "start is -1"),
        (dict(decode_steps=2.5), "decode_steps is 2.5"),
        (dict(temperature=float("nan")), "temperature is nan"),
    ],
)
def test_bad_settings_are_refused(model, settings, words):
    """One line: what, and what would be right."""
    with pytest.raises(ValueError, match=words):
        model.sample(0, **settings)


def test_what_is_not_trained_says_so(tmp_path, trained):
    """A workdir without checkpoints loads, offers no model, and names the command that trains one."""
    import shutil

    for name in ("config.json", "tokenizer"):
        (shutil.copytree if (trained / name).is_dir() else shutil.copy)(
            trained / name, tmp_path / name
        )
    empty = dl.load(tmp_path)
    assert empty.models == ()
    with pytest.raises(dl.CheckpointError, match="no trained model; run launch/train.py"):
        empty.sample(0)
    with pytest.raises(dl.CheckpointError, match="stage mdlm_long is not trained"):
        empty.sample(0, model="mdlm_long")
    with pytest.raises(dl.ConfigError, match="does not exist"):
        dl.load(tmp_path / "nowhere")


def test_a_damaged_checkpoint_is_named(tmp_path, trained):
    """A truncated file is one clear line with the checkpoint's path."""
    import shutil

    shutil.copytree(trained, tmp_path / "w")
    folder = max(
        (tmp_path / "w" / "mdlm" / "checkpoints").iterdir(),
        key=lambda p: int(p.name) if p.name.isdigit() else -1,
    )
    for path in folder.rglob("*"):
        if path.is_file() and "ema" in path.parts and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(dl.CheckpointError, match="is damaged: ema/") as error:
        dl.load(tmp_path / "w").sample(0, model="mdlm")
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_pure_pieces_under_jit_and_vmap(model):
    """The sampler's own function, jitted and vmapped over keys by the caller."""
    import jax.numpy as jnp

    params, controls = model.parameters("diladiff"), model.controls(decode_steps=2)
    prompt = jnp.full((2, 32), model.tokenizer.mask_id, jnp.int32)
    generate = lambda key: (
        model.sampler.generate("diladiff", params, key, jnp.arange(2), prompt, controls).tokens
    )
    keys = jax.random.split(jax.random.key(0), 3)
    many = jax.jit(jax.vmap(generate))(keys)
    np.testing.assert_array_equal(many[1], jax.jit(generate)(keys[1]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(order="count"), "order is no setting of a draw; the config's sampling.order has it"),
        (dict(bogus=1), "bogus is no setting of a draw; known are decode_steps"),
        (dict(key="0"), "key is '0'"),
        (dict(key=np.zeros(2, np.uint32)), "key is array"),
        (dict(start=2**31 - 1, num=2), "start is 2147483647"),
        (dict(start="0"), "start is '0'"),
        (dict(decode_steps=2**31), "decode_steps is 2147483648"),
        (dict(decode_steps="4"), "decode_steps is '4'"),
        (dict(temperature=float("inf")), "temperature is inf"),
        (dict(top_p="1"), "top_p is '1'"),
    ],
)
def test_what_no_draw_can_be_is_named(trained, arguments, words):
    """Each of these ended inside JAX, or in a bare TypeError."""
    with pytest.raises(ValueError, match=re.escape(words)):
        dl.load(trained).sample(**{"key": 0, "model": "mdlm"} | arguments)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "the prompt is empty"),
        (["Mia", ""], "the prompt is empty"),
        ("Mia " * 32, "tokens; the model holds 32"),
        ("[MASK] saw a [mask] kite", r"has '\[mask\]'; .* is written \[MASK\]"),
        ("a <mask>", "'<mask>'"),
    ],
)
def test_prompts_without_text_or_room_are_refused(trained, prompt, words):
    """Nothing to hold fixed, or nothing to fill in."""
    model = dl.load(trained)
    with pytest.raises(ValueError, match=words):
        model.prompt_tokens(prompt)
    full = model.tokenizer.decode(model.tokenizer.encode("Mia " * 32)[:32])
    assert len(model.tokenizer.encode(full)) == 32
    with pytest.raises(ValueError, match="fills all 32 tokens"):
        model.prompt_tokens(full)
    assert (model.prompt_tokens("[MASK]" * 32) == model.tokenizer.mask_id).all()
