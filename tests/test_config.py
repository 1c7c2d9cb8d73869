"""The schema: shipped experiments are valid, everything else is refused in one line that says what would be right."""

import importlib.util
import json
import pathlib

import pytest
from micro import micro_config

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
    """Every file in configs/ resolves, and says in its docstring how it is run."""
    resolve(get_config(path))
    assert "launch/train.py" in path.read_text().split('"""')[1]


def test_tiny_takes_its_corpus():
    """stories, pydocs, or a folder."""
    path = next(p for p in CONFIGS if p.stem == "tiny")
    assert resolve(get_config(path)).data.corpus == "stories"
    assert resolve(get_config(path, "pydocs")).data.corpus == "pydocs"
    mine = resolve(get_config(path, "/some/folder"))
    assert (mine.data.corpus, mine.data.files) == ("text_files", "/some/folder")


def test_the_published_setting():
    """METHOD section 7, as configs/owt.py has it."""
    c = resolve(get_config(next(p for p in CONFIGS if p.stem == "owt")))
    assert (c.data.length, c.mdlm.batch, c.mdlm.steps, c.mdlm.learning_rate, c.mdlm.ema) == (
        1024,
        512,
        1_000_000,
        3e-4,
        0.9999,
    )
    a = c.autoencoder
    assert (a.steps, a.learning_rate, a.b1, a.b2, a.epsilon, a.weight_decay, a.clip) == (
        200_000,
        5e-5,
        0.9,
        0.98,
        1e-6,
        1e-5,
        10.0,
    )
    assert (a.noise, a.p_feat, a.p_lat, a.p_drop, a.warmup, a.decoder_warmup) == (
        0.5,
        0.7,
        0.7,
        0.75,
        1_000,
        10_000,
    )
    assert (c.ladiff.steps, c.ladiff.learning_rate, c.ladiff.clip, c.ladiff.ema, c.diffusion.d) == (
        150_000,
        2e-4,
        1.0,
        0.9999,
        10.0,
    )
    assert (
        c.mdlm.schedule,
        c.mdlm.warmup,
        c.ladiff.warmup,
        c.ladiff.self_conditioning,
        c.diladiff.self_conditioning,
    ) == ("cosine", 1_000, 1_000, 0.5, 0.5)
    assert (
        c.diladiff.time_mean,
        c.diladiff.time_std,
        c.diladiff.p_equal,
        c.diladiff.loss_offset,
        c.diladiff.step_form,
    ) == (-1.0, 1.0, 0.25, 5.0, "velocity")
    assert c.decoder.cross_layers == (0, 11)
    assert (
        c.diladiff.steps,
        c.diladiff.batch,
        c.diladiff.learning_rate,
        c.diladiff.tangent_warmup,
    ) == (25_000, 2048, 5e-5, 10_000)
    s = c.sampling
    assert (s.temperature, s.top_p, s.prior_steps, s.prior_method, s.student_steps, s.gamma) == (
        1.0,
        0.9,
        200,
        "euler",
        5,
        0.8,
    )
    assert (c.encoder.num_latents, c.encoder.latent_dim, c.encoder.num_layers) == (512, 768, 2)
    assert (c.features.source, c.features.path, c.tokenizer.kind) == (
        "bert",
        "bert-base-uncased",
        "wordpiece",
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mdlm": {"stepz": 1}}, "mdlm.stepz is unknown; did you mean mdlm.steps"),
        ({"nothing": 1}, "nothing is unknown"),
        ({"mdlm": {"steps": 1.5}}, "mdlm.steps is 1.5; it must be a whole number"),
        ({"mdlm": {"steps": True}}, "must be a whole number"),
        ({"mdlm": 3}, "must be a block of settings"),
        ({"mdlm": {"steps": -1}}, "mdlm.steps is -1; it must be 0 or more"),
        (
            {"mdlm": {"accumulate": 3}},
            "mdlm.accumulate is 3; it must be a divisor of mdlm.batch = 16",
        ),
        (
            {"backbone": {"heads": 3}},
            "backbone.heads is 3; it must be a divisor of backbone.width = 16",
        ),
        ({"backbone": {"embedding_std": 0.0}}, "backbone.embedding_std is 0.0; it must be above 0"),
        ({"latent_denoiser": {"width": 18, "heads": 6}}, "even (rotary positions)"),
        (
            {"encoder": {"num_latents": 64}},
            "encoder.num_latents is 64; it must be between 1 and data.length = 32",
        ),
        (
            {"decoder": {"cross_layers": (0, 2)}},
            "decoder.cross_layers is (0, 2); it must be layer indices from 0 to 1",
        ),
        ({"decoder": {"cross_layers": ("a",)}}, "sequence of whole numbers"),
        (
            {"tokenizer": {"kind": "wordpiece"}},
            "tokenizer.file is ''; it must be a vocabulary file",
        ),
        ({"data": {"corpus": "text_files"}}, "data.files is ''"),
        ({"data": {"length": 1}}, "data.length is 1"),
        (
            {"data": {"scorer_documents": 0}},
            "data.scorer_documents is 0; it must be above 0 when scorer.steps is",
        ),
        ({"sampling": {"top_p": 1.5}}, "sampling.top_p is 1.5; it must be between 0 and 1"),
        ({"sampling": {"gamma": 1.0}}, "sampling.gamma is 1.0; it must be in [0, 1)"),
        ({"sampling": {"prior_method": "rk4"}}, "one of euler, ddim, heun, dpmpp_2m"),
        ({"diffusion": {"d": 0.0}}, "diffusion.d is 0.0; it must be above 0"),
        ({"diffusion": {"t0": 1.0}}, "diffusion.t0 is 1.0; it must be between 0 and 1"),
        ({"diffusion": {"k": 20.0}}, "diffusion.k is 20.0; it must be above 0 and at most 8"),
        ({"diffusion": {"schedule": "cosine"}}, "one of tangent, linear_variance, empirical"),
        (
            {
                "diffusion": {"schedule": "linear_variance"},
                "sampling": {"prior_method": "ddim"},
                "diladiff": {"step_form": "velocity", "p_noise": 0.0, "p_clean": 0.0},
            },
            "diladiff.step_form is 'velocity'; it must be rotation",
        ),
        (
            {
                "diffusion": {"schedule": "linear_variance"},
                "sampling": {"prior_method": "heun"},
                "diladiff": {"step_form": "rotation", "p_noise": 0.0, "p_clean": 0.0},
            },
            "sampling.prior_method is 'heun'; it must be ddim or dpmpp_2m",
        ),
        (
            {"sampling": {"skip_layers": (1,)}},
            "sampling.skip_layers is (1,); it must be layer indices from 0 to 0",
        ),
        (
            {"sampling": {"skip_layers": (0,), "refresh_every": 2}},
            "empty when sampling.refresh_every is above 1",
        ),
        (
            {"sampling": {"skip_layers": (0,), "order": "threshold"}},
            "empty when sampling.order is threshold",
        ),
        ({"mesh": {"data": -1, "fsdp": -1}}, "mesh.data is -1"),
        (
            {"backbone": {"width": 2**30}},
            "backbone.width is 1073741824; it must be between 1 and 131072",
        ),
        (
            {"backbone": {"num_layers": 2**31 - 1}},
            "backbone.num_layers is 2147483647; it must be between 1 and 1024",
        ),
        ({"backbone": {"mlp_ratio": 0.0}}, "backbone.mlp_ratio is 0.0"),
        ({"backbone": {"mlp_ratio": 1e30}}, "backbone.mlp_ratio is 1e+30"),
        ({"encoder": {"latent_dim": 2**31 - 1}}, "encoder.latent_dim is 2147483647"),
        ({"mdlm": {"batch": 2**30}}, "mdlm.batch is 1073741824"),
        (
            {"mdlm": {"steps": 2**31}},
            "mdlm.steps is 2147483648; it must be a whole number of 32 bits",
        ),
        (
            {"mdlm": {"learning_rate": float("nan")}},
            "mdlm.learning_rate is nan; it must be a finite number",
        ),
        (
            {"mdlm": {"learning_rate": 10**400}},
            "mdlm.learning_rate is inf; it must be a finite number",
        ),
        (
            {"compute_dtype": "float16"},
            "compute_dtype is 'float16'; it must be one of float32, bfloat16",
        ),
    ],
)
def test_impossible_settings_are_refused_in_one_line(changes, words):
    """Unknown keys, wrong types and impossible combinations, before any array is made."""
    with pytest.raises(ConfigError) as error:
        micro_config(**changes)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_names_are_text():
    with pytest.raises(ConfigError, match="config key mdlm.1 is of type int"):
        resolve({"mdlm": {1: 1}})


def test_save_and_load_round_trip(tmp_path):
    """config.json gives back the same experiment; blocks that may change may."""
    config = micro_config()
    config_file.save(config, tmp_path)
    assert config_file.load(tmp_path).to_dict() == config.to_dict()
    config_file.save(micro_config(sampling=dict(decode_steps=9), mdlm=dict(steps=9)), tmp_path)
    assert config_file.load(tmp_path).sampling.decode_steps == 9
    config_file.save(
        micro_config(backbone=dict(width=48)), tmp_path
    )  # nothing was made from it: it may be mended
    (tmp_path / "prepared.json").write_text("{}")
    with pytest.raises(ConfigError, match="backbone.width differs"):
        config_file.save(micro_config(backbone=dict(width=32)), tmp_path)
    with pytest.raises(
        ConfigError, match="config keys backbone.num_layers, backbone.width differ from"
    ):
        config_file.save(micro_config(backbone=dict(width=32, num_layers=3)), tmp_path)
    with pytest.raises(
        ConfigError, match=r"config keys( [a-z._]+,){2} [a-z._]+ and 1 more differ from"
    ):
        config_file.save(
            micro_config(backbone=dict(width=32, num_layers=3), seed=9, diffusion=dict(d=2.0)),
            tmp_path,
        )
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        config_file.save(config, tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("[" * 20_000, "is not JSON"),
        ("9" * 5000, "is not JSON"),
        ("[]", "one JSON object"),
        (json.dumps({"x": 1}), "x is unknown"),
    ],
)
def test_a_damaged_config_is_one_line(tmp_path, content, words):
    """A workdir whose config.json is damaged says so."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=words):
        config_file.load(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        config_file.load(tmp_path / "none")
    with pytest.raises(ConfigError, match="cannot be read"):
        config_file.load(tmp_path / "config.json")


def test_an_experiment_that_something_was_made_from_is_held_first_and_written_last(tmp_path):
    """`first` writes a new workdir's experiment, and leaves one alone that a command may yet be refused on."""
    config_file.save(micro_config(), tmp_path, first=True)
    (tmp_path / "prepared.json").write_text("{}")
    config_file.save(micro_config(mdlm=dict(steps=9)), tmp_path, first=True)
    assert config_file.load(tmp_path).mdlm.steps == 6
    with pytest.raises(ConfigError, match="backbone.width differs"):
        config_file.save(micro_config(backbone=dict(width=32)), tmp_path, first=True)
    config_file.save(micro_config(mdlm=dict(steps=9)), tmp_path)
    assert config_file.load(tmp_path).mdlm.steps == 9
