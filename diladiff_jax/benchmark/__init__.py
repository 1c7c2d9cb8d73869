"""Benchmarks on random weights: how fast the samplers and the training updates run on this machine.

`sampling.run` times several ways of decoding against a sampler that saves no work;
`training.run` times the update of every stage and its parts. Both return a document that
`launch/benchmark.py` writes as JSON and that `report` prints and plots.
"""

from diladiff_jax.benchmark.sizes import SIZES, experiment_config
from diladiff_jax.benchmark.timing import OutOfMemoryError, default_dtype

__all__ = ["SIZES", "OutOfMemoryError", "default_dtype", "experiment_config"]
