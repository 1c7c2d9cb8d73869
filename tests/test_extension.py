"""A new stage and a new sampled model, registered from this file alone, go through the whole path.

The toy stage learns one direction of the latent space; the toy model samples a latent along it.
No file of the library knows either of them.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from micro import micro_config
from parameters import random_parameters

import diladiff_jax as dl
from diladiff_jax import stages
from diladiff_jax.data.options import DataOptions
from diladiff_jax.data.prepared import load_prepared
from diladiff_jax.jax_settings import random_key
from diladiff_jax.objectives import WHOLE
from diladiff_jax.options import Options, above, setting
from diladiff_jax.run_options import TrainingOptions
from diladiff_jax.sampling.categorical import sample_keys, split_per_sample
from diladiff_jax.storage import bundles
from diladiff_jax.training.run import train


@dataclasses.dataclass(frozen=True)
class MeanLatentOptions(Options):
    """Options of the toy stage."""

    pull: float = setting(0.5, "weight of the squared error", above(0))


@dataclasses.dataclass(frozen=True, eq=False)
class MeanLatent:
    """Learns the mean of the latents: the smallest prior there is."""

    text_encoder: object
    options: MeanLatentOptions

    def init(self, key):
        encoder = self.text_encoder.encoder
        shape = (encoder.num_latents, encoder.latent_dim)
        return {"mean": {"kernel": jax.random.normal(key, shape)}}

    def loss(self, params, context, tokens, key, step, *, train=True, part=WHOLE):
        z = self.text_encoder(context.frozen, context.statistics, tokens)
        error = jnp.square(z - params["mean"]["kernel"][None]).mean()
        return self.options.pull * error, ({"error": error}, context.statistics)

    def group(self, path):
        return "toy"


@dataclasses.dataclass(frozen=True)
class AroundTheMean:
    """Latents of the toy model: the learned mean and half of the usual noise."""

    def bind(self, options):
        return self

    def __call__(self, sampler, params, keys, controls):
        noise = dl.sampling.NullLatents()(sampler, params, keys, controls)
        return params["toy"]["mean"]["kernel"][None] + 0.5 * noise


TOY_STAGE = stages.Stage(
    name="toy",
    title="mean of the latents",
    build=lambda parts, options: MeanLatent(parts.text_encoder, options),
    options=MeanLatentOptions(),
    training=TrainingOptions(batch=16, schedule="constant"),
    predecessor="autoencoder",
    frozen={"features": stages.FEATURES, "encoder": ("autoencoder", "encoder")},
    preview="toy_model",
)
TOY_MODEL = stages.SampledModel(
    name="toy_model",
    title="Toy around the mean",
    parameters={"decoder": ("autoencoder", "decoder"), "toy": ("toy",)},
    source=AroundTheMean(),
    color="#00a0a0",
    dark_color="#40e0e0",
    marker="*",
)


@pytest.fixture
def toy():
    """Both records, registered for one test."""
    dl.register_stage(TOY_STAGE)
    dl.register_model(TOY_MODEL)
    yield
    del stages.STAGES["toy"], stages.MODELS["toy_model"]


def test_a_stage_and_a_model_from_outside_train_sample_and_are_reported(
    toy, trained, tmp_path, capsys
):
    config = micro_config(
        toy=dict(steps=4, pull=2.0, learning_rate=0.1, warmup=1),
        evaluation=dict(samples=16, decode_steps=(2,), control_steps=(2,)),
        logging=dict(samples=1),
    )
    workdir = tmp_path / "w"
    earlier = bundles.export(
        dl.load(trained).experiment, tmp_path / "earlier", stages=("mdlm", "autoencoder")
    )
    train(config, workdir, ("toy",), init_from=earlier)
    metrics = [
        json.loads(line)
        for line in (workdir / "toy" / "metrics" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [record["train/loss"] for record in metrics if "train/loss" in record]
    assert losses[-1] < losses[0], "the one loop trains the toy stage"
    printed = capsys.readouterr().out
    assert "toy 4: validation error" in printed and "\n  | " in printed, "with a preview"

    model = dl.load(workdir)
    assert model.models == ("mdlm", "toy_model") and model.best == "mdlm"
    samples = model.sample(0, num=2, model="toy_model", decode_steps=2)
    assert len(samples.texts) == 2
    assert samples.latents.shape == (2, *model.networks.latent_shape)

    from diladiff_jax.evaluation import evaluate
    from diladiff_jax.evaluation.report import write_report

    prepared = load_prepared(DataOptions.of(config.data), workdir)
    results = evaluate(model, prepared)
    assert "toy_model" in {row["model"] for row in results["rows"]}
    write_report(model, prepared, results, workdir / "report")
    page = (workdir / "report" / "report.html").read_text()
    assert TOY_MODEL.title in page
    assert TOY_MODEL.color in page and TOY_MODEL.dark_color in page


def test_config_knows_a_new_stage_and_checks_its_options(toy):
    with pytest.raises(dl.ConfigError, match=r"toy\.pull: got -1\.0, expected a number above 0"):
        micro_config(toy=dict(pull=-1.0))
    with pytest.raises(dl.ConfigError, match="toy.pul"):
        micro_config(toy=dict(pul=1.0))


def test_a_workdir_of_an_extension_that_is_not_imported_says_so(tmp_path):
    """Its config.json has a block that no stage declares."""
    (tmp_path / "config.json").write_text(json.dumps({"toy": {"steps": 1}}))
    with pytest.raises(
        dl.ConfigError, match="'toy' is not a block of a config. If it is a stage of"
    ):
        dl.load(tmp_path)


def test_a_new_stage_changes_nothing_for_the_others(toy):
    """Random keys and data seeds of a stage depend on its name, not on its place in a list."""
    from diladiff_jax.training import setup

    def draws(name):
        keys = jax.random.key_data(setup.stage_keys(0, name))
        return setup.data_seed(0, name), keys.tolist()

    before = {name: draws(name) for name in stages.STAGES}
    first = stages.STAGES.pop("mdlm")
    try:
        after = {name: draws(name) for name in stages.STAGES}
    finally:
        rest = dict(stages.STAGES)
        stages.STAGES.clear()
        stages.STAGES.update({"mdlm": first, **rest})
    assert all(before[name] == drawn for name, drawn in after.items())
    assert len({str(drawn) for drawn in before.values()}) == len(before)


def test_names_are_registered_once():
    with pytest.raises(ValueError, match="already registered"):
        dl.register_stage(stages.STAGES["mdlm"])
    with pytest.raises(ValueError, match="already registered"):
        dl.register_model(stages.MODELS["mdlm"])
    with pytest.raises(ValueError, match="not registered"):
        dl.register_stage(dataclasses.replace(TOY_STAGE, predecessor="nothing"))


def test_a_model_with_another_network_samples_with_it(trained):
    """It has half the layers of the MDLM's; its parameters would not fit the MDLM's network."""

    def half(networks):
        layers = networks.denoiser.num_layers // 2
        return dataclasses.replace(networks, denoiser=networks.denoiser.clone(num_layers=layers))

    smaller = stages.SampledModel("half", "Half", {"denoiser": ("mdlm",)}, networks=half)
    experiment = dl.load(trained).experiment
    sampler = smaller.sampler(experiment.sampler)
    assert sampler.networks.denoiser.num_layers == 1
    assert experiment.sampler.networks.denoiser.num_layers == 2
    params = {"denoiser": random_parameters(sampler.networks.denoiser, np.zeros((1, 32), int))}
    assert "block_1" not in params["denoiser"]
    prompt = experiment.process.initial((2, 32))
    controls = dl.sampling.Controls.of(sampler.options, None)._replace(decode_steps=2)
    sample = jax.jit(sampler.generate, static_argnums=0)(
        None, params, jax.random.key(0), jnp.arange(2), prompt, controls
    )
    assert experiment.tokenizer.sampleable[sample.tokens].all()


def test_the_autoregressive_baseline_writes_from_left_to_right(trained):
    """It is the cached sampler of its network: given tokens stay, each other one has its step."""
    model = dl.load(trained)
    prompt = model.prompt_tokens("Mia went to the [MASK] and")
    found = model.infill(3, prompt, model="autoregressive", top_p=1.0)
    is_open = prompt == model.tokenizer.mask_id
    np.testing.assert_array_equal(found.tokens[~is_open], prompt[~is_open])
    np.testing.assert_array_equal(found.unmasked_at, np.where(is_open, np.arange(32), -1))

    keys = sample_keys(random_key(3), jnp.arange(1))
    _, token_keys = split_per_sample(keys)
    network = stages.MODELS["autoregressive"].networks(model.networks).denoiser
    assert network.causal
    alone = dl.sampling.AutoregressiveSampler(
        network, model.experiment.process, model.tokenizer.eot_id
    )
    expected = jax.jit(alone)(model.trained("autoregressive"), token_keys, jnp.asarray(prompt))
    np.testing.assert_array_equal(found.tokens, expected.tokens)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (dict(title="MDLM"), "another one has the title 'MDLM'"),
        (dict(parameters={"toy": ("mdlm",)}), "parameters has no 'denoiser'"),
        (dict(source=dl.sampling.NullLatents()), "parameters has no 'decoder'"),
        (
            dict(parameters={"decoder": ("autoencoder", "decoder")}, takes_latents=True),
            "takes_latents is for controls only",
        ),
    ],
)
def test_a_model_that_could_not_be_sampled_is_not_registered(model, words):
    given = dict(name="x", title="X", parameters={"denoiser": ("mdlm",)}) | model
    with pytest.raises(ValueError, match=words):
        dl.register_model(stages.SampledModel(**given))
    assert "x" not in stages.MODELS


def test_a_stage_is_not_named_like_another_folder_of_a_workdir():
    with pytest.raises(ValueError, match="something else of that name"):
        dl.register_stage(dataclasses.replace(TOY_STAGE, name="latents"))


def test_a_solver_is_a_record():
    with pytest.raises(TypeError, match="expected a Solver"):
        dl.sampling.register_solver("bare", lambda step: step.z)
