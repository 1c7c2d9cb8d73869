"""The settings of the networks: what is rejected, and what they build."""

import pytest

from diladiff_jax import nn
from diladiff_jax.options import OptionError


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        (nn.BackboneOptions, dict(width=0), "width: got 0, expected between 1 and 131072"),
        (nn.BackboneOptions, dict(heads=5), "heads: got 5, expected a divisor of width = 768"),
        (nn.BackboneOptions, dict(width=9, heads=3, positions="rotary"), "width / heads is even"),
        (nn.BackboneOptions, dict(mlp_ratio=1e-4), "mlp_ratio: got 0.0001, expected a number for"),
        (nn.BackboneOptions, dict(dropout=1.0), "dropout: got 1.0, expected in"),
        (nn.LatentDenoiserOptions, dict(width=9, heads=3), "width / heads is even"),
        (nn.EncoderOptions, dict(num_layers=2000), "num_layers: got 2000, expected between"),
        (nn.DecoderOptions, dict(cross_layers=()), "cross_layers: got .*, expected a non-empty"),
        (nn.DecoderOptions, dict(cross_layers=(-1,)), "cross_layers"),
        (nn.ScorerOptions, dict(heads=0), "heads: got 0, expected at least 1"),
        (nn.FeaturesOptions, dict(source="bert"), "path: got '', expected an encoder's folder"),
        (nn.FeaturesOptions, dict(source="bert", path="x", with_embeddings=True), "with_embedd"),
    ],
)
def test_invalid_settings_are_rejected(options, settings, message):
    """The message names the setting, its value, and what is valid."""
    with pytest.raises(OptionError, match=message):
        options(**settings)


def test_defaults_are_the_published_sizes():
    """12 layers of width 768, 512 latents; the scorer is a causal backbone without adaLN."""
    networks = nn.build_networks(nn.NetworkOptions(), length=1024, vocab_size=30_522)
    assert networks.latent_shape == (512, 768)
    for network in (networks.denoiser, networks.teacher, networks.student, networks.scorer):
        assert (network.num_layers, network.width, network.heads) == (12, 768, 12)
    assert networks.scorer.causal and not networks.denoiser.causal
    assert networks.student.interval and not networks.teacher.interval
