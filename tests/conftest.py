"""Fixtures that all tests share, and what has to happen before jax and the library are imported.

Eight virtual CPU devices let every sharding test run anywhere.
"""

import atexit
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile

from xla_flags import FAST_COMPILATION

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tools" / "reliability"))

if "PYTEST_XDIST_WORKER" not in os.environ:  # all processes of a run share compiled programs
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="xla")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        FAST_COMPILATION,
    ]
)

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from fork_server import ForkServer
from jaxtyping import install_import_hook
from parameters import random_parameters

# A suite in the background of a shell, or under nohup, inherits that these are ignored, and so
# would the commands that it starts and signals.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

jax.config.update("jax_numpy_rank_promotion", "raise")
# Checks the shape annotations of the four pure rooms. It must precede their first import.
install_import_hook(
    [f"diladiff_jax.{room}" for room in ("nn", "diffusion", "objectives", "sampling")],
    "shape_checks.check_shapes",
)

ROOT = pathlib.Path(__file__).parents[1]
LENGTH, VOCAB, MASK, PAD = 8, 12, 10, 11


@pytest.fixture(scope="session")
def chi_square():
    """p-value of observed counts under probabilities; an impossible cell that was hit gives 0."""

    def p_value(counts, probabilities):
        counts, probabilities = (
            np.asarray(counts, float).ravel(),
            np.asarray(probabilities, float).ravel(),
        )
        possible = probabilities > 0
        if counts[~possible].any():
            return 0.0
        expected = counts.sum() * probabilities[possible] / probabilities.sum()
        assert expected.min() >= 5, "too few draws for the chi-square approximation"
        return scipy.stats.chisquare(counts[possible], expected).pvalue

    return p_value


@pytest.fixture(scope="session")
def sampleable():
    """Ids 0 to 9 are text, 10 the mask, 11 padding."""
    return np.arange(VOCAB) < MASK


@pytest.fixture(scope="session")
def network_settings():
    return {
        "compute_dtype": "float32",
        "backbone": dict(width=16, num_layers=1, heads=2),
        "encoder": dict(num_latents=4, latent_dim=6, width=16, heads=2, num_layers=1, dropout=0.1),
        "decoder": {"cross_layers": (0,)},
        "latent_denoiser": dict(width=16, num_layers=1, heads=2),
        "scorer_network": dict(width=16, num_layers=1, heads=2),
        "memory": {"scan": False, "remat": "none", "loss_positions": 128},
    }


@pytest.fixture(scope="session")
def networks(network_settings):
    """All networks of a tiny experiment: 8 tokens of a vocabulary of 12, 4 latents of width 6.

    One layer each, because compiling is what takes time.
    """
    from diladiff_jax.nn.networks import NetworkOptions, build_networks

    return build_networks(NetworkOptions.of(network_settings), LENGTH, VOCAB)


def perturbed(tree, seed, scale=0.3):
    """A copy of a parameter tree with noise on every leaf, so that no parameter stays at zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(x + scale * rng.normal(size=x.shape), x.dtype), tree)


@pytest.fixture(scope="session", name="random_parameters")
def _random_parameters():
    return random_parameters


@pytest.fixture(scope="session")
def perturb():
    return perturbed


@pytest.fixture(scope="session")
def run_command():
    """Runs a command of launch/ on one device, without the seconds that its imports take."""
    with ForkServer({"XLA_FLAGS": FAST_COMPILATION}) as server:
        yield lambda script, *words: server.run(
            ROOT / "launch" / script, words, cwd=ROOT, limit=300
        )


def pytest_collection_modifyitems(items):
    """Puts one file that needs the trained workdir first, and the other ones last.

    One test process trains it then, while the others have something else to do.
    """
    files = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    waiting = [path for path in files if any("trained" in i.fixturenames for i in files[path])]
    order = [*waiting[:1], *(path for path in files if path not in waiting), *waiting[1:]]
    items[:] = [item for path in order for item in files[path]]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A workdir with every stage of the micro experiment trained, in a process with one device.

    The first test process that needs it trains it for all.
    """
    base = tmp_path_factory.getbasetemp()
    workdir = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "trained"
    with filelock.FileLock(f"{workdir}.lock"):
        if not (done_mark := workdir.with_name("trained.done")).exists():
            config = workdir.with_name("trained_config.py")
            config.write_text("from micro import micro_config\n\nget_config = micro_config\n")
            words = [f"--config={config}", f"--workdir={workdir}", "--stage=all"]
            paths = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
            done = subprocess.run(
                [sys.executable, str(ROOT / "launch" / "train.py"), *words],
                env=os.environ | paths | {"XLA_FLAGS": FAST_COMPILATION},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            done_mark.touch()
    return workdir
