"""A model computes in the type that its run asks for, whatever it was trained in."""

import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from micro import micro_config
from parameters import random_parameters
from storage.bundle_files import update_hashes

import diladiff_jax as dl
from diladiff_jax import config as config_lib
from diladiff_jax import model as model_lib
from diladiff_jax.data import tokenizers
from diladiff_jax.experiment import Experiment
from diladiff_jax.parallel import sharding
from diladiff_jax.stages import STAGES
from diladiff_jax.storage import bundles, config_file
from diladiff_jax.training import train

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnop"]
STAGE_NAMES = ("mdlm", "autoencoder", "diladiff")


class RandomExperiment(Experiment):
    """An experiment whose stages have random parameters instead of trained ones."""

    def trained_steps(self, stage):
        return STAGES[stage].training.steps if stage in STAGE_NAMES else 0

    def restore(self, stage):
        objective, seed = self.objective(stage), STAGE_NAMES.index(stage)
        network = types.SimpleNamespace(init=lambda key: {"params": objective.init(key)})
        return random_parameters(network, seed=seed)

    def restore_statistics(self):
        shapes = jax.eval_shape(self.objective("autoencoder").init_statistics)
        return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)


def one_device():
    return sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A bundle with bfloat16 parameters of a model that was trained in bfloat16."""
    folder = tmp_path_factory.mktemp("precision")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = tokenizers.from_vocabulary(folder / "vocab.txt", "wordpiece", lowercase=True)
    config = micro_config(
        compute_dtype="bfloat16",
        data=dict(length=8),
        tokenizer=dict(kind="wordpiece", file="vocab.txt", lowercase=True),
    )
    experiment = RandomExperiment(config, folder, tokenizer, one_device())
    return bundles.export(experiment, folder / "bundle", dtype=jnp.bfloat16)


@pytest.fixture(scope="module")
def float32_bundle(bundle, tmp_path_factory):
    """The same parameters under a config that says float32."""
    folder = shutil.copytree(bundle, tmp_path_factory.mktemp("precision") / "float32")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"compute_dtype": "float32"}))
    update_hashes(folder)
    return folder


def load(folder, **options):
    return dl.load(folder, mesh=one_device(), **options)


def test_a_bfloat16_model_samples_in_float32_as_the_float32_network(bundle, float32_bundle):
    """Tokens and latents are equal bit for bit."""
    theirs = load(float32_bundle).sample(0, 8, decode_steps=2)
    ours = load(bundle, compute_dtype="float32").sample(0, 8, decode_steps=2)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.latents, theirs.latents)


def test_each_type_gives_the_networks_own_logits(bundle, float32_bundle):
    """A float32 model in bfloat16 is the bfloat16 model, and not the float32 one."""
    tokens = np.arange(8)[None] + 5

    def logits(model):
        params = {"params": model.trained("mdlm")}
        return np.asarray(model.networks.denoiser.apply(params, tokens))

    exact = logits(load(float32_bundle))
    rounded = logits(load(float32_bundle, compute_dtype="bfloat16"))
    np.testing.assert_array_equal(logits(load(bundle, compute_dtype="bfloat16")), rounded)
    assert 0 < np.abs(exact - rounded).mean() < 0.05 * exact.std()


def test_cpus_compute_in_float32_unless_asked(bundle):
    """The config keeps what the model was trained in, so that an export does too."""
    model = load(bundle)
    assert (model.experiment.compute_dtype, model.config.compute_dtype) == ("float32", "bfloat16")
    assert load(bundle, compute_dtype="bfloat16").networks.decoder.backbone.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("platform", "asked", "expected"),
    [
        ("cpu", "bfloat16", "float32"),
        ("gpu", "bfloat16", None),
        ("tpu", "bfloat16", None),
        ("cpu", "float32", None),  # a config that differs from the bundle's
    ],
)
def test_the_default_type_is_the_one_that_suits_the_device(bundle, platform, asked, expected):
    """None means what the config asks for."""
    config = config_lib.resolve(config_file.load(bundle).to_dict() | {"compute_dtype": asked})
    assert model_lib._run_dtype(None, config, bundle, platform) == expected


@pytest.mark.slow
def test_what_belongs_to_a_run_may_differ_from_the_bundle(bundle):
    """Layers that are scanned read the same parameters and give the same samples."""
    settings = config_file.load(bundle).to_dict()
    settings["memory"] |= dict(scan=True, remat="full", param_dtype="bfloat16")
    settings["mesh"] |= dict(fsdp=8)
    settings["sampling"] |= dict(order="count")
    settings["compute_dtype"] = "float32"
    settings["features"]["compute_dtype"] = "float32"
    config = config_lib.resolve(settings)
    scanned, plain = (
        load(bundle, config=config).sample(0, 4, decode_steps=2),
        load(bundle, config=config_lib.resolve(settings | {"memory": {}})).sample(
            0, 4, decode_steps=2
        ),
    )
    np.testing.assert_array_equal(scanned.tokens, plain.tokens)
    np.testing.assert_allclose(scanned.latents, plain.latents, rtol=1e-4, atol=1e-5)


def test_what_parameters_depend_on_may_not_differ(bundle):
    settings = config_file.load(bundle).to_dict()
    settings["diffusion"]["d"] = 2.0
    with pytest.raises(dl.ConfigError, match=r"diffusion\.d differs"):
        load(bundle, config=config_lib.resolve(settings))


def test_an_unknown_type_is_rejected_in_one_line(bundle):
    with pytest.raises(dl.ConfigError, match="compute_dtype: got 'float16', expected one of"):
        load(bundle, compute_dtype="float16")


@pytest.mark.slow
def test_a_stage_continues_in_another_precision_and_memory_setting(tmp_path, capsys):
    """And back. The note names each setting; parameters of the samplers stay float32."""
    memory = dict(scan=True, param_dtype="bfloat16")
    for steps, changes in (
        (2, {}),
        (4, dict(compute_dtype="bfloat16", memory=memory)),
        (5, {}),
    ):
        config = micro_config(mdlm=dict(optimizer="adamw", steps=steps), **changes)
        with jax.numpy_rank_promotion("allow"):  # optax promotes
            train(config, tmp_path / "w", ("mdlm",))
        assert capsys.readouterr().out.count("note: ") == (3 if steps > 2 else 0)
    model = dl.load(tmp_path / "w")
    assert model.trained_steps("mdlm") == 5
    assert {leaf.dtype for leaf in jax.tree.leaves(model.trained("mdlm"))} == {np.dtype("float32")}


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_the_student_is_sampled_in_the_runs_type(bundle, steps):
    """In bfloat16 its latents are those of float32 within 5% of their size, and not equal to them.

    bfloat16 rounds to 2^-9; random weights of two layers and four steps multiply that.
    """
    found = {
        dtype: np.asarray(
            load(bundle, compute_dtype=dtype)
            .sample(0, 8, model="diladiff", latent_steps=steps, decode_steps=1)
            .latents
        )
        for dtype in ("float32", "bfloat16")
    }
    exact, rounded = found["float32"], found["bfloat16"]
    assert 0 < np.linalg.norm(rounded - exact) < 0.05 * np.linalg.norm(exact)
