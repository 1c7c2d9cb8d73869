"""launch/compile.py with the real TPU compiler: every stage and a sampler, and bad input."""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from micro import micro_config

from diladiff_jax import preflight
from diladiff_jax.parallel import sharding
from diladiff_jax.stages import STAGES as ALL_STAGES

ROOT = pathlib.Path(__file__).resolve().parents[2]
STAGES = [name for name, stage in ALL_STAGES.items() if not stage.baseline]
PER_DEVICE = {
    "parameter_bytes",
    "peak_bytes",
    "capacity_bytes",
    "flops",
    "bytes_accessed",
    "collectives",
    "estimated_seconds",
    "estimated_utilization",
    "bound_by",
}


def libtpu_is_here():
    return bool(
        os.environ.get("TPU_LIBRARY_PATH")
        or importlib.util.find_spec("libtpu")
        or (ROOT / ".venv/libtpu/libtpu/libtpu.so").exists()
    )


needs_libtpu = pytest.mark.skipif(
    not libtpu_is_here(),
    reason="libtpu is not installed (launch/test.sh installs it where it can be had)",
)


def run(*words, timeout=1800, **environment):
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")
    }  # virtual CPU devices are none of the compiler's business
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def compile_py(*flags, **options):
    return run("launch/compile.py", *flags, **options)


SCRIPT = """
import json, sys
sys.path[:0] = ["launch", "tests"]
import cli
import compile as command
from micro import micro_config
from diladiff_jax import preflight
cli._compilation_cache()
command.find_libtpu()
documents = {}
for name, stage, sampler, topology, changes in json.loads(sys.argv[1]):
    where = preflight.parse_topology(topology)
    documents[name] = command.compiled(
        micro_config(**changes), where, where, stage=stage, sampler=sampler, source="micro"
    )
json.dump(documents, open(sys.argv[2], "w"))
"""

SMALL = dict(
    backbone=dict(num_layers=1),
    decoder=dict(cross_layers=(0,)),
    latent_denoiser=dict(num_layers=1),
    **{stage: dict(optimizer="adamw") for stage in STAGES},
)
# A length of 128 uses the splash attention kernel, and two devices per axis use every kind of
# sharding.
LONG = dict(
    data=dict(length=128),
    mesh=dict(data=2, fsdp=2, tensor=2),
    backbone=dict(width=128, num_layers=3, heads=2),
    decoder=dict(cross_layers=(0, 2)),
    memory=dict(scan=True, remat="matmuls"),
    mdlm=dict(optimizer="adamw"),
)
CASES = [
    ("mdlm", "mdlm", None, "v5p:2x2x2", LONG),
    *((stage, stage, None, "v5e:2x2", SMALL) for stage in STAGES[1:]),
    ("sampler", None, "diladiff", "v5e:2x2", SMALL),
]


@functools.cache
def documents(folder):
    """All cases in one process, for starting the compiler takes a while."""
    out = folder / "documents.json"
    done = run("-c", SCRIPT, json.dumps(CASES), str(out))
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@needs_libtpu
def test_every_stage_and_a_sampler_compile_for_a_tpu(tmp_path_factory):
    """The compiler accepts every part of the library, and the figures are consistent."""
    found = documents(tmp_path_factory.getbasetemp())
    assert list(found) == [case[0] for case in CASES]
    for name, document in found.items():
        per = document["per_device"]
        assert {
            "config",
            "stage",
            "topology",
            "devices",
            "fits",
            "per_device",
        } <= document.keys() and per.keys() >= PER_DEVICE
        assert (
            document["fits"]
            and 0 < per["parameter_bytes"] < per["peak_bytes"] < per["capacity_bytes"]
        ), name
        assert (
            per["flops"] > 0 and per["bytes_accessed"] > 0 and 0 < per["estimated_utilization"] < 1
        )
        longest = max(per[f"{part}_seconds"] for part in ("compute", "memory", "interconnect"))
        assert longest == per[f"{per['bound_by']}_seconds"] and per[
            "estimated_seconds"
        ] >= longest * (1 - 1e-9)
        assert all(each["count"] > 0 and each["bytes"] > 0 for each in per["collectives"].values())
        assert not per["uncounted_kernels"], f"{name}: a kernel whose work is not counted"
    # Data parallelism sums every gradient of the prior once: the bytes of its parameters, and the
    # metrics.
    summed = found["ladiff"]["per_device"]["collectives"]["all-reduce"]["bytes"]
    trained = preflight.parameter_bytes(abstract_parameters("ladiff"))
    assert 0.99 * trained <= summed < 1.2 * trained  # what the loss does not read has no gradient
    # Parameters sharded over fsdp are gathered where they are used. The program computes at least
    # what the model needs.
    per = found["mdlm"]["per_device"]
    assert {"all-gather", "all-reduce"} <= per["collectives"].keys() and per["model_flops"] <= per[
        "flops"
    ] < 2 * per["model_flops"]


def abstract_parameters(stage):
    """Shapes of what a stage of the small experiment trains, on one device."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    return preflight.AbstractExperiment(micro_config(**SMALL), mesh).restore(stage)


@pytest.mark.slow
@needs_libtpu
def test_the_command_writes_a_document_and_a_table(tmp_path):
    """For a sampler with an overridden batch; exit code 3 if the batch is too large."""
    out = tmp_path / "out.json"
    flags = ["--config=configs/tiny.py", "--sampler=mdlm", "--topology=v5e:2x2", f"--out={out}"]
    done = compile_py(*flags, "--config.sampling.batch=30")
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    assert [document[name] for name in ("config", "stage", "topology", "devices", "batch")] == [
        "configs/tiny.py",
        "mdlm sampler",
        "v5e:2x2",
        4,
        32,
    ]
    assert "peak memory" in done.stdout and "bound by" in done.stdout
    done = compile_py(*flags, f"--config.sampling.batch={2**26}")
    assert (
        done.returncode == 3
        and len(done.stderr.strip().splitlines()) == 1
        and "does not fit" in done.stderr
    )
    document = json.loads(out.read_text())
    assert (
        not document["fits"]
        and document["per_device"]["peak_bytes"] > document["per_device"]["capacity_bytes"]
    )


@pytest.mark.slow
@needs_libtpu
def test_scaling_has_a_row_for_each_slice(tmp_path):
    """The batch grows with the chips, the work of a chip stays."""
    out = tmp_path / "out.json"
    done = compile_py(
        "--config=configs/tiny.py",
        "--stage=mdlm",
        "--topology=v5e",
        "--scaling=4,16",
        "--config.mdlm.optimizer=adamw",
        f"--out={out}",
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    assert [(row["topology"], row["batch"]) for row in document["rows"]] == [
        ("v5e:2x2", 128),
        ("v5e:4x4", 512),
    ]
    small, large = (row["per_device"] for row in document["rows"])
    assert (
        large["flops"] == pytest.approx(small["flops"], rel=0.01)
        and large["interconnect_seconds"] > small["interconnect_seconds"]
    )
    assert "efficiency" in done.stdout and "knee" in document


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("stage", STAGES)
def test_the_published_setting_fits_sixteen_small_chips(stage):
    """configs/owt.py on v5e:4x4."""
    done = compile_py(
        "--config=configs/owt.py", f"--stage={stage}", "--topology=v5e:4x4", timeout=1800
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--topology=v5e:4x4", "--stage=mdlm"], "--config is missing"),
        (["--config=configs/tiny.py", "--stage=mdlm"], "--topology is missing"),
        (["--config=configs/tiny.py", "--topology=v5e:4x4"], "one of --stage=STAGE"),
        (["--config=configs/tiny.py", "--topology=v9:4x4", "--stage=mdlm"], "expected one of v4"),
        (
            ["--config=configs/tiny.py", "--topology=v5e:4x4", "--stage=nothing"],
            "--stage: got 'nothing'",
        ),
        (
            [
                "--config=configs/tiny.py",
                "--topology=v5e:4x4",
                "--stage=mdlm",
                "--config.mdlm.batchs=3",
            ],
            "Did you mean",
        ),
        (
            ["--config=configs/tiny.py", "--topology=v5e", "--scaling=16,x", "--stage=mdlm"],
            "--scaling: got 'x'",
        ),
        pytest.param(
            ["--config=configs/tiny.py", "--topology=v5e:3x5", "--stage=mdlm"],
            "rejected by the TPU compiler",
            marks=needs_libtpu,
        ),
        pytest.param(
            [
                "--config=configs/tiny.py",
                "--topology=v5e:2x2",
                "--stage=mdlm",
                "--config.mesh.fsdp=3",
            ],
            "the number of devices, 4",
            marks=needs_libtpu,
        ),
        pytest.param(
            [
                "--config=configs/tiny.py",
                "--topology=v5e:2x2",
                "--stage=mdlm",
                "--config.mdlm.batch=6",
            ],
            "mdlm.batch: got 6",
            marks=needs_libtpu,
        ),
        pytest.param(
            ["--config=configs/tiny.py", "--topology=v5e:2x2", "--sampler=gpt"],
            "--sampler: got 'gpt'",
            marks=needs_libtpu,
        ),
    ],
)
@pytest.mark.slow
def test_bad_input_is_one_line(flags, words):
    """Exit 1, one line that says what, no traceback."""
    done = compile_py(*flags)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_missing_compiler_is_one_line():
    """Where TPU_LIBRARY_PATH leads nowhere."""
    done = compile_py(
        "--config=configs/tiny.py",
        "--topology=v5e:2x2",
        "--stage=mdlm",
        TPU_LIBRARY_PATH="/nowhere/libtpu.so",
    )
    assert (
        done.returncode == 1
        and "TPU_LIBRARY_PATH: got /nowhere/libtpu.so" in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
    )


def test_a_vocabulary_stands_in_for_a_tokenizer():
    """It has as many ids as a trained tokenizer of these settings, padded in the same way."""
    from diladiff_jax.data import TokenizerOptions, tokenizers

    settings = micro_config().tokenizer
    options = TokenizerOptions(kind=settings.kind, vocab_size=settings.vocab_size)
    text = [chr(first) + chr(second) for first in range(97, 123) for second in range(97, 123)] * 3
    trained = tokenizers.train(text, options)
    found = preflight.Vocabulary.of(settings)
    assert found.vocab_size % 128 == 0 and found.vocab_size - trained.vocab_size in (
        0,
        128,
        256,
    )  # small corpora give fewer pieces than asked
    assert (
        found.sampleable.shape == (found.vocab_size,)
        and not found.sampleable[found.mask_id]
        and found.sampleable[found.eot_id]
    )


def test_nothing_fits_is_read_from_the_compilers_complaint():
    """Bytes out of its message; other complaints are not about memory."""
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space"
        " hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    )
    assert preflight.exhausted_bytes(message) == int(20.5 * 2**30)
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO"
        " temporaries (548.25G) exceeds available HBM (15.75G)."
    )
    assert preflight.exhausted_bytes(message) == int(548.25 * 2**30)
    assert preflight.exhausted_bytes("INVALID_ARGUMENT: no") is None


def test_decoding_trips_have_their_limits():
    """One step takes as many rounds as its rows need; with many steps, few are empty."""
    assert preflight.decoding_trips(16, 32, 1) == (
        1.0,
        2.0,
    )  # 256 rows at once: 16 positions of each of 16 texts
    steps, rounds = preflight.decoding_trips(32, 1024, 64)
    assert steps == 64.0 and 2.0 < rounds < 6.0
    steps, rounds = preflight.decoding_trips(1, 8, 10_000)
    assert 7.9 < steps <= 8.0 and rounds == 1.0
    assert preflight.decoding_trips(32, 1024, 64, "count") == (
        64.0,
        2.0,
    )  # 16 of each row, 8 at a time
    assert preflight.decoding_trips(1, 256, 2, "confidence") == (
        2.0,
        1.0,
    ) and preflight.decoding_trips(2, 256, 2, "confidence") == (2.0, 1.5)


SLICES = """
import sys
sys.path[:0] = ["launch", "."]
import compile as command
command.find_libtpu()
from jax.experimental import topologies
from diladiff_jax.parallel import sharding
description = topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:4x4", num_slices=2
)
devices = list(description.devices)
mesh = sharding.make_mesh({"data": 2, "fsdp": 8, "tensor": 2}, devices)
print([sorted({device.slice_index for device in part.ravel()}) for part in mesh.devices])
def distance(a, b):
    return max(abs(x - y) for x, y in zip(a.coords, b.coords))
tensor = [[distance(*pair) for pair in part] for part in mesh.devices]
print({gap for part in tensor for gap in part})
try:
    sharding.make_mesh({"data": 1, "fsdp": 16, "tensor": 2}, devices)
except ValueError as error:
    print(error)
"""


@needs_libtpu
def test_a_mesh_over_slices_crosses_between_them_along_data_alone():
    """In two slices of 16, each data index is in one slice and tensor pairs are neighbours."""
    done = run("-c", SLICES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "[[0], [1]]",
        "{1}",
        "config.mesh.data: got 1, expected a multiple of the 2 slices, because only this axis may "
        "extend over several slices",
    ]
