"""MAUVE: its limits, its order and its features."""

import builtins

import jax.numpy as jnp
import numpy as np
import pytest

from diladiff_jax.evaluation.measures import mauve


def cloud(seed, shift=0.0, n=200):
    return np.random.default_rng(seed).normal(size=(n, 8)) + shift * np.eye(8)[0]


def test_mauve_falls_from_one_to_zero_with_distance():
    """The result holds all settings and counts."""
    pytest.importorskip("mauve")
    values = [
        mauve.mauve(cloud(0), cloud(1, shift), kmeans_num_redo=1) for shift in (0.0, 2.0, 20.0)
    ]
    alike, near, far = (v["value"] for v in values)
    assert alike > 0.9 and far < 0.05 and far < near < alike
    for v in values:
        assert 0 <= v["low"] <= v["value"] <= v["high"] <= 1
        assert (
            (v["samples"], v["data_samples"]) == (200, 200)
            and set(v["settings"]) == set(mauve.SETTINGS)
            and v["settings"]["kmeans_num_redo"] == 1
        )


def test_invalid_input_and_a_missing_package_are_reported(monkeypatch):
    with pytest.raises(ValueError, match="MAUVE setting: got 'buckets'"):
        mauve.mauve(cloud(0), cloud(1), buckets=3)
    with pytest.raises(ValueError, match="at least 20 samples"):
        mauve.mauve(cloud(0), cloud(1, n=5))
    with pytest.raises(ValueError, match="the same D"):
        mauve.mauve(cloud(0), cloud(1)[:, :3])
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "faiss":
            raise ImportError("No module named 'faiss'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(mauve.MissingPackage, match="mauve-text and faiss-cpu"):
        mauve.mauve(cloud(0), cloud(1))


def test_mean_hidden_averages_the_counted_positions():
    """With any batch size."""
    tokens = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], np.int32)
    counted = np.array([[1, 1, 0], [1, 1, 1], [0, 0, 1]], bool)
    found = mauve.mean_hidden(
        lambda rows: jnp.stack([rows, -rows], axis=-1), tokens, counted, batch=2
    )
    np.testing.assert_allclose(found, [[1.5, -1.5], [5, -5], [9, -9]])
