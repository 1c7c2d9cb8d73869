"""The schema of experiments, the shipped ones, and errors of invalid settings."""

import dataclasses
import importlib.util
import json
import pathlib

import pytest
from micro import micro_config

from diladiff_jax import config as config_lib
from diladiff_jax.config import ConfigError, resolve
from diladiff_jax.storage import config_file

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


def get_config(path, *arguments):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_experiments_are_valid(path):
    """Every file in configs/ resolves, and its docstring has the command that trains it."""
    resolve(get_config(path))
    assert "launch/train.py" in path.read_text().split('"""')[1]


def test_the_argument_of_the_tiny_config_is_its_corpus():
    """stories, pydocs, or a folder of text."""
    path = next(p for p in CONFIGS if p.stem == "tiny")
    assert resolve(get_config(path)).data.corpus == "stories"
    assert resolve(get_config(path, "pydocs")).data.corpus == "pydocs"
    mine = resolve(get_config(path, "/some/folder"))
    assert (mine.data.corpus, mine.data.files) == ("text_files", "/some/folder")


PUBLISHED = {
    "data": dict(length=1024),
    "tokenizer": dict(kind="wordpiece"),
    "features": dict(source="bert", path="bert-base-uncased"),
    "encoder": dict(num_latents=512, latent_dim=768, num_layers=2),
    "decoder": dict(cross_layers=(0, 11)),
    "diffusion": dict(d=10.0),
    "mdlm": dict(
        steps=1_000_000,
        batch=512,
        learning_rate=3e-4,
        ema=0.9999,
        schedule="cosine",
        warmup=1_000,
    ),
    "autoencoder": dict(
        steps=200_000,
        learning_rate=5e-5,
        b1=0.9,
        b2=0.98,
        epsilon=1e-6,
        weight_decay=1e-5,
        clip=10.0,
        warmup=1_000,
        decoder_warmup=10_000,
        noise=0.5,
        p_feat=0.7,
        p_lat=0.7,
        p_drop=0.75,
    ),
    "ladiff": dict(
        steps=150_000,
        learning_rate=2e-4,
        clip=1.0,
        ema=0.9999,
        warmup=1_000,
        self_conditioning=0.5,
    ),
    "diladiff": dict(
        steps=25_000,
        batch=2048,
        learning_rate=5e-5,
        tangent_warmup=10_000,
        self_conditioning=0.5,
        time_mean=-1.0,
        time_std=1.0,
        p_equal=0.25,
        loss_offset=5.0,
        step_form="velocity",
    ),
    "sampling": dict(
        temperature=1.0,
        top_p=0.9,
        prior_steps=200,
        prior_method="euler",
        student_steps=5,
        gamma=0.8,
    ),
}
"""docs/method.md, Published settings."""


@pytest.mark.parametrize("block", PUBLISHED)
def test_the_openwebtext_config_is_the_published_setting(block):
    """configs/owt.py has every value of the paper."""
    config = resolve(get_config(next(path for path in CONFIGS if path.stem == "owt")))
    assert {name: config[block][name] for name in PUBLISHED[block]} == PUBLISHED[block]


# The options classes that the schema is made of.

OPTIONS = [(name, part) for name, parts in config_lib.blocks().items() for part in parts]
OPTION_IDS = [f"{name or 'top level'}-{type(part).__name__}" for name, part in OPTIONS]


def test_the_default_config_has_exactly_the_blocks_of_the_schema():
    """And each block exactly the settings of its options classes."""
    config, blocks = config_lib.default_config().to_dict(), config_lib.blocks()
    names = lambda parts: [field.name for part in parts for field in dataclasses.fields(part)]
    assert config.keys() == {*blocks, *names(blocks[""])} - {""}
    for name, parts in blocks.items():
        assert len(set(names(parts))) == len(names(parts)), "two classes declare the same setting"
        if name:
            assert list(config[name]) == names(parts) or config[name].keys() == {*names(parts)}


@pytest.mark.parametrize(("block", "part"), OPTIONS, ids=OPTION_IDS)
def test_every_setting_has_a_help_text_and_a_valid_default(block, part):
    """The default satisfies its rule, and its type is one that the config can convert to."""
    for field in dataclasses.fields(part):
        assert field.metadata.get("help", "").strip(), f"{block}.{field.name} has no help text"
        rule = field.metadata["rule"]
        assert rule is None or (rule.words and rule.holds(field.default)), field.name
        assert type(field.default) in (int, float, str, bool, tuple), field.name
    assert type(part)() == type(part).of({}) and not list(type(part)().conflicts())


def test_the_default_config_is_valid():
    """So an experiment file has to set only what differs."""
    assert resolve({}).to_dict() == config_lib.default_config().to_dict()


# Invalid settings.

LINEAR_VARIANCE = {"schedule": "linear_variance"}
NO_CORNERS = {"p_noise": 0.0, "p_clean": 0.0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mdlm": {"stepz": 1}}, "mdlm.stepz: unknown config key; did you mean mdlm.steps?"),
        ({"nothing": 1}, "nothing: unknown config key"),
        ({"mdlm": {"steps": 1.5}}, "mdlm.steps: got 1.5, expected a whole number"),
        ({"mdlm": {"steps": True}}, "mdlm.steps: got True, expected a whole number"),
        ({"mdlm": 3}, "mdlm: got 3, expected a block of settings"),
        ({"mdlm": {"steps": -1}}, "mdlm.steps: got -1, expected at least 0"),
        ({"mdlm": {"accumulate": 3}}, "mdlm.accumulate: got 3, expected a divisor of batch = 16"),
        ({"mdlm": {"batch": 2**30}}, "mdlm.batch: got 1073741824, expected between 1 and"),
        ({"mdlm": {"steps": 2**31}}, "mdlm.steps: got 2147483648, expected a whole number of 32"),
        ({"mdlm": {"learning_rate": float("nan")}}, "got nan, expected a finite number"),
        ({"mdlm": {"learning_rate": 10**400}}, "got inf, expected a finite number"),
        ({"backbone": {"heads": 3}}, "backbone.heads: got 3, expected a divisor of width = 16"),
        ({"backbone": {"embedding_std": 0.0}}, "got 0.0, expected a number above 0"),
        ({"backbone": {"width": 2**30}}, "backbone.width: got 1073741824, expected between 1 and"),
        ({"backbone": {"num_layers": 2**31 - 1}}, "backbone.num_layers: got 2147483647, expected"),
        ({"backbone": {"mlp_ratio": 0.0}}, "backbone.mlp_ratio: got 0.0, expected"),
        ({"backbone": {"mlp_ratio": 1e30}}, "backbone.mlp_ratio: got 1e+30, expected"),
        ({"latent_denoiser": {"width": 18, "heads": 6}}, "even (rotary positions"),
        ({"encoder": {"num_latents": 64}}, "got 64, expected at most data.length = 32"),
        ({"encoder": {"latent_dim": 2**31 - 1}}, "encoder.latent_dim: got 2147483647, expected"),
        ({"decoder": {"cross_layers": (0, 2)}}, "got (0, 2), expected layer indices from 0 to 1"),
        ({"decoder": {"cross_layers": ("a",)}}, "expected a sequence of whole numbers"),
        ({"tokenizer": {"kind": "wordpiece"}}, "tokenizer.file: got '', expected a vocabulary"),
        ({"data": {"corpus": "text_files"}}, "data.files: got '', expected a file, folder or glob"),
        ({"data": {"length": 1}}, "data.length: got 1, expected between 2 and"),
        ({"data": {"scorer_documents": 0}}, "data.scorer_documents: got 0, expected above 0 when"),
        ({"sampling": {"top_p": 1.5}}, "sampling.top_p: got 1.5, expected between 0 and 1"),
        ({"sampling": {"gamma": 1.0}}, "sampling.gamma: got 1.0, expected in [0, 1)"),
        ({"sampling": {"prior_method": "rk4"}}, "expected one of euler, ddim, heun, dpmpp_2m"),
        ({"sampling": {"skip_layers": (1,)}}, "got (1,), expected layer indices from 0 to 0"),
        (
            {"sampling": {"skip_layers": (0,), "refresh_every": 2}},
            "sampling.skip_layers: got (0,), expected empty when refresh_every is above 1",
        ),
        (
            {"sampling": {"skip_layers": (0,), "order": "threshold"}},
            "sampling.skip_layers: got (0,), expected empty when order is threshold",
        ),
        ({"diffusion": {"d": 0.0}}, "diffusion.d: got 0.0, expected a number above 0"),
        ({"diffusion": {"t0": 1.0}}, "diffusion.t0: got 1.0, expected in (0, 1)"),
        ({"diffusion": {"k": 20.0}}, "diffusion.k: got 20.0, expected in (0, 8]"),
        ({"diffusion": {"schedule": "cosine"}}, "one of tangent, linear_variance, empirical"),
        (
            {"diffusion": LINEAR_VARIANCE, "diladiff": NO_CORNERS | {"step_form": "velocity"}},
            "diladiff.step_form: got 'velocity', expected rotation when diffusion.schedule is",
        ),
        (
            {"diffusion": LINEAR_VARIANCE, "diladiff": {"p_noise": 0.5}},
            "diladiff.p_noise: got 0.5, expected 0 when diffusion.schedule is linear_variance",
        ),
        (
            {
                "diffusion": LINEAR_VARIANCE,
                "diladiff": NO_CORNERS,
                "sampling": {"prior_method": "heun"},
            },
            "sampling.prior_method: got 'heun', expected ddim or dpmpp_2m when",
        ),
        ({"mesh": {"data": -1, "fsdp": -1}}, "mesh.data: got -1, expected"),
        ({"compute_dtype": "float16"}, "got 'float16', expected one of float32, bfloat16"),
    ],
)
def test_an_invalid_setting_is_rejected_in_one_line(changes, words):
    """Unknown keys, wrong types, values out of range and impossible combinations."""
    with pytest.raises(ConfigError) as error:
        micro_config(**changes)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_config_key_that_is_not_text_is_rejected():
    """Rather than compared with those that are."""
    with pytest.raises(ConfigError, match="mdlm.1: got a key of type int, expected text"):
        resolve({"mdlm": {1: 1}})


# config.json of a workdir.


def test_a_saved_config_loads_as_it_was(tmp_path):
    """Blocks that may change, and numbers of steps, can be saved again with other values."""
    config = micro_config()
    config_file.save(config, tmp_path)
    assert config_file.load(tmp_path).to_dict() == config.to_dict()
    config_file.save(micro_config(sampling=dict(decode_steps=9), mdlm=dict(steps=9)), tmp_path)
    assert config_file.load(tmp_path).sampling.decode_steps == 9
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        config_file.save(config, tmp_path / "file")


def test_a_config_that_something_was_made_from_cannot_change(tmp_path):
    """The error names up to three of the keys that differ."""
    config_file.save(micro_config(), tmp_path)
    config_file.save(micro_config(backbone=dict(width=48)), tmp_path)  # nothing was made from it
    (tmp_path / "prepared.json").write_text("{}")
    narrow = dict(width=32, num_layers=3)
    for changes, words in (
        (dict(backbone=dict(width=32)), "config key backbone.width differs from"),
        (dict(backbone=narrow), "config keys backbone.num_layers, backbone.width differ from"),
        (
            dict(backbone=narrow, seed=9, diffusion=dict(d=2.0)),
            r"config keys( [a-z._]+,){2} [a-z._]+ and 1 more differ from",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            config_file.save(micro_config(**changes), tmp_path)


def test_precision_and_memory_may_change_with_a_note(tmp_path):
    """The note names each setting once a stage is trained; before that, nothing has changed."""
    config_file.save(micro_config(), tmp_path)
    (tmp_path / "prepared.json").write_text("{}")
    changed = micro_config(
        compute_dtype="bfloat16",
        features=dict(compute_dtype="float32"),
        memory=dict(scan=True),
        logging=dict(samples=3),
    )
    assert config_file.continuation_notes(changed, tmp_path) == []
    (tmp_path / "mdlm" / "checkpoints" / "6").mkdir(parents=True)
    config_file.require_own(changed, tmp_path)
    notes = config_file.continuation_notes(changed, tmp_path)
    keys = ["compute_dtype", "features.compute_dtype", "memory.scan"]
    assert sorted(note.partition(":")[0] for note in notes) == keys
    assert "was float32 in the training so far, is bfloat16 from now on" in "".join(notes)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("[" * 20_000, "is not JSON"),
        ("9" * 5000, "is not JSON"),
        ("[]", "one JSON object"),
        (json.dumps({"x": 1}), "x: unknown config key"),
    ],
    ids=["half", "deep", "number", "list", "key"],
)
def test_a_damaged_config_is_one_line(tmp_path, content, words):
    """Without a traceback, whatever is in the file."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=words) as error:
        config_file.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_workdir_without_a_config_is_one_line(tmp_path):
    """So is a file in place of a workdir."""
    with pytest.raises(ConfigError, match="does not exist"):
        config_file.load(tmp_path / "none")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        config_file.load(tmp_path / "config.json")


def test_the_first_save_keeps_a_config_that_something_was_made_from(tmp_path):
    """A command that fails later then leaves the workdir's experiment unchanged."""
    config_file.save(micro_config(), tmp_path, first=True)
    (tmp_path / "prepared.json").write_text("{}")
    config_file.save(micro_config(mdlm=dict(steps=9)), tmp_path, first=True)
    assert config_file.load(tmp_path).mdlm.steps == 6
    with pytest.raises(ConfigError, match="backbone.width differs"):
        config_file.save(micro_config(backbone=dict(width=32)), tmp_path, first=True)
    config_file.save(micro_config(mdlm=dict(steps=9)), tmp_path)
    assert config_file.load(tmp_path).mdlm.steps == 9
