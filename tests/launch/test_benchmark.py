"""launch/benchmark.py at its smallest, and the formulas of its FLOPs."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from diladiff_jax.benchmark import decoding_flops, torch_mdlm
from diladiff_jax.nn.transformer import TokenDenoiser
from diladiff_jax.training.flops import model_flops

PEERS = ("autoregressive", "mdlm_torch")
ROOT = pathlib.Path(__file__).resolve().parents[2]


def run_benchmark(out, *flags, timeout):
    done = subprocess.run(
        [sys.executable, "launch/benchmark.py", "--size=tiny", f"--out={out}", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    assert out.with_suffix(".png").exists()
    return json.loads(out.read_text()), done.stdout


@pytest.mark.slow
def test_sampling_rows_describe_every_case(tmp_path):
    """The exact cases give the same tokens, and the library's takes less temporary memory.

    Peers have rows of their own; those that need PyTorch are left out if it is not installed.
    """
    steps = ["--decode_steps=8", "--timed_steps=4", "--latent_steps=1", "--prior_steps=8"]
    flags = ["--suite=sampling", "--batch=4", "--length=32", "--rounds=1", "--peers", *steps]
    document, printed = run_benchmark(tmp_path / "bench.json", *flags, timeout=300)
    assert "naive" in printed and "4 timed steps" in printed
    machine = document["machine"]
    assert machine["matmul_flops_per_second"] > 0 and machine["count"] >= 1
    latents = [(row["sampler"], row["steps"], row["timed_steps"]) for row in document["latents"]]
    assert latents == [("student", 1, 1), ("prior", 8, 4)]

    rows = {row["case"]: row for row in document["rows"]}
    assert list(rows) == ["naive", "bisection", "ours", "approx_skip", "approx_refresh_4"]
    setting = {"suite": "sampling", "batch": 4, "length": 32, "vocab": 512, "dtype": "float32"}
    setting |= {"decode_steps": 8, "timed_steps": 4}
    positive = ("compile_seconds_cold", "compile_seconds_cached", "peak_memory_bytes")
    positive += ("fraction_of_matmul_rate", "linear_maps_seconds", "attention_products_seconds")
    for case, row in rows.items():
        assert setting.items() <= row.items()
        assert row["tokens_as_first"] > 0.95 or case.startswith("approx")
        assert min(row[name] for name in positive) > 0
        assert abs(row["seconds"] - row["latent_seconds"] - row["decode_seconds"]) < 1e-9
        assert abs(row["tokens_per_second"] * row["seconds"] - 4 * 32) < 1e-6
    assert rows["ours"]["decode_memory_bytes"] < 0.5 * rows["naive"]["decode_memory_bytes"]

    names = [f"peer_{name}{p}" for name in PEERS for p in ("", "_nucleus")]
    peers, left_out = document["peers"], document["peers_left_out"]
    assert [row["case"] for row in peers + left_out] == names
    for row in peers:
        ratio = row["decode_seconds"] / rows["ours"]["decode_seconds"]
        assert row["over_ours"] == pytest.approx(ratio) and row["case"] in printed
        assert 0 < row["over_ours_with_latents"] < row["over_ours"]
    for row in left_out:
        assert row["reason"] == "PyTorch is not installed" and row["reason"] in printed


class TestTorchMDLM:
    """The published sampler in PyTorch, where that is installed."""

    @pytest.fixture(scope="class")
    def model(self):
        torch = pytest.importorskip("torch")
        return torch_mdlm.TorchMDLM(torch, torch_mdlm.Size(6, 64, 16, 2, 2, 4.0), "cpu", "float32")

    def test_it_fills_every_mask_and_keeps_the_prompt(self, model):
        """It calls the network once after each step that has unmasked something."""
        prompt = np.where(np.arange(64) % 2, 5, np.arange(64) % 5)[None].repeat(2, axis=0)
        tokens, calls = model.sample(prompt, 7, 5, 0.9)
        assert (tokens < 5).all() and (tokens[prompt < 5] == prompt[prompt < 5]).all()
        assert calls == 7
        prompt[:, 2:] = 0  # two texts with one mask each
        assert model.sample(prompt, 7, 5)[1] <= 3

    @pytest.mark.parametrize(("top_p", "kept"), [(None, 5), (0.7, 2)])
    def test_it_samples_from_the_networks_distribution(
        self, model, monkeypatch, chi_square, top_p, kept
    ):
        """12,800 tokens under fixed logits, whose most likely two have a mass of 0.75 (p > 1e-4).
        The mask, whose logit is the largest, is never sampled."""
        p = np.array([0.1, 0.5, 0.05, 0.25, 0.1, 1e9])
        logits = model._torch.tensor(np.log(p), dtype=model._torch.float32)
        monkeypatch.setattr(model, "logits", lambda x: logits.repeat(*x.shape, 1))
        tokens, _ = model.sample(np.full((200, 64), 5), 4, 5, top_p)
        expected = np.where(np.argsort(np.argsort(-p[:5])) < kept, p[:5], 0)
        assert (
            chi_square(np.bincount(tokens.ravel(), minlength=5), expected / expected.sum()) > 1e-4
        )

    def test_its_linear_maps_are_as_large_as_those_of_the_backbone(self, model):
        """Parameters of embedding, head and blocks, without gains, positions and norms."""
        ours = TokenDenoiser(6, 64, 16, 2, 2)
        shapes = jax.eval_shape(ours.init, jax.random.key(0), jnp.zeros((1, 64), jnp.int32))
        flat = jax.tree_util.tree_flatten_with_path(shapes)[0]
        matrices = [
            leaf.size for path, leaf in flat if leaf.ndim == 2 and "position" not in str(path)
        ]
        theirs = [model._embedding, model._head, *(w for l in model._layers for w in l.values())]
        assert sum(matrices) == sum(w.numel() for w in theirs if w.ndim == 2)


def three_layer_decoder(networks, network_settings):
    """A decoder of three layers, of which `approx_skip` skips one, and its config."""
    backbone = networks.decoder.backbone.clone(num_layers=3, name=None)
    decoder = networks.decoder.clone(backbone=backbone, cross_layers=(0, 2))
    config = ConfigDict(network_settings | {"data": {"length": backbone.length}})
    config.unlock()
    config.backbone.num_layers, config.backbone.mlp_ratio = 3, backbone.mlp_ratio
    config.decoder.cross_layers = (0, 2)
    return decoder, config


def test_the_flop_formulas_agree_with_the_traced_network(
    networks, network_settings, random_parameters
):
    """Each case's formula equals the products counted in the traced parts of the network."""
    batch, steps = 16, 4
    decoder, config = three_layer_decoder(networks, network_settings)
    backbone = decoder.backbone
    x = jnp.zeros((batch, backbone.length), jnp.int32)
    z = jnp.zeros((batch, *networks.latent_shape))
    positions = jnp.zeros((batch, backbone.length // steps), jnp.int32)
    params = random_parameters(decoder, x, z)

    def call(method, *inputs, **options):
        return decoder.apply({"params": params}, *inputs, method=method, **options)

    def count(method, *inputs, **options):
        # No parameter is differentiated, so this counts the forward pass.
        return model_flops(
            lambda _, *inputs: jax.tree.leaves(call(method, *inputs, **options)), {}, *inputs
        )

    def shapes(method, *inputs):
        return jax.eval_shape(lambda *inputs: call(method, *inputs), *inputs)

    memory = shapes("memory", z)
    h = shapes("before_last", x, memory)
    keys_values = shapes("last_keys_values", h)
    finishing = (
        count("last_keys_values", h)
        + count("finish_at", h, keys_values, positions)
        + count("project", shapes("finish_at", h, keys_values, positions))
    )
    all_layers = count("before_last", x, memory)
    without_skipped = count("before_last", x, memory, skip=decoding_flops.skipped_layers(3))
    assert without_skipped < all_layers
    counted = {
        "naive": steps * count("__call__", x, z),
        "bisection": steps * count("__call__", x, z),
        "ours": count("memory", z) + steps * (all_layers + finishing),
        "approx_skip": count("memory", z)
        + steps / 2 * (all_layers + without_skipped)
        + steps * finishing,
    }
    formulas = {
        case: decoding_flops.decoding_flops(case, config, backbone.vocab_size, batch, steps, 4)
        for case in counted
    }
    assert formulas == pytest.approx(counted, rel=1e-6)
    assert formulas["approx_skip"] < formulas["ours"] < formulas["naive"]


@pytest.mark.parametrize("group", [1, 4])
def test_the_expected_busy_steps_are_the_mean_of_random_draws(group):
    """Against 4,000 draws (z < 5, false alarm 1e-6)."""
    steps = np.random.default_rng(0).integers(0, 64, (4_000, 40)) // group
    counts = np.array([len(np.unique(row)) for row in steps])
    expected = decoding_flops.expected_busy_steps(40, 64, group)
    assert abs(counts.mean() - expected) < 5 * counts.std() / np.sqrt(len(counts))


@pytest.mark.slow
def test_training_rows_describe_every_stage(tmp_path):
    document, printed = run_benchmark(
        tmp_path / "bench.json", "--suite=training", "--batch=64", "--rounds=3", timeout=900
    )
    assert "diladiff" in printed
    rows = document["rows"]
    assert [row["case"] for row in rows] == ["mdlm", "autoencoder", "ladiff", "diladiff"]
    for row in rows:
        assert (row["suite"], row["batch"], row["length"]) == ("training", 64, 32)
        assert 0 < row["fraction_of_matmul_rate"] < 1
        assert abs(row["tokens_per_second"] * row["seconds"] - 64 * 32) < 1e-6
        assert row["seconds_low"] <= row["seconds"] <= row["seconds_high"]
