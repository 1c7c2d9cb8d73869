"""launch/compile.py: stages and a sampler compiled by the real TPU compiler, its documents, and its
errors."""

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


def has_libtpu():
    return bool(
        os.environ.get("TPU_LIBRARY_PATH")
        or importlib.util.find_spec("libtpu")
        or (ROOT / ".venv/libtpu/libtpu/libtpu.so").exists()
    )


needs_libtpu = pytest.mark.skipif(
    not has_libtpu(),
    reason="libtpu is not installed; launch/test.sh installs it if it is available",
)


def run(*words, timeout=1800, **environment):
    # Without the virtual CPU devices of the tests.
    inherited = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
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
import cli_cache, compile as command
from micro import micro_config
from diladiff_jax import preflight
cli_cache.keep_compiled_programs()
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
# A length of 128 uses the splash attention kernel; two devices along each mesh axis use every kind
# of sharding.
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
    ("ladiff", "ladiff", None, "v5e:2x2", SMALL),
    ("sampler", None, "diladiff", "v5e:2x2", SMALL),
]
MORE_CASES = [(stage, stage, None, "v5e:2x2", SMALL) for stage in ("autoencoder", "diladiff")]


def compile_cases(cases, folder):
    """Compiles cases in one process, because the compiler takes a while to start."""
    out = folder / "documents.json"
    done = run("-c", SCRIPT, json.dumps(cases), str(out))
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compile_cases(CASES, tmp_path_factory.mktemp("compiled"))


@needs_libtpu
@pytest.mark.parametrize("name", [case[0] for case in CASES])
def test_stages_and_a_sampler_compile_for_a_tpu(compiled, name):
    check(compiled[name])


@pytest.mark.slow
@needs_libtpu
def test_the_other_stages_compile_for_a_tpu_too(tmp_path):
    for document in compile_cases(MORE_CASES, tmp_path).values():
        check(document)


def check(document):
    """The document has all fields, and its figures are consistent."""
    per = document["per_device"]
    assert {"config", "stage", "topology", "devices", "fits"} <= document.keys()
    assert per.keys() >= PER_DEVICE
    assert document["fits"]
    assert 0 < per["parameter_bytes"] < per["peak_bytes"] < per["capacity_bytes"]
    assert per["flops"] > 0 and per["bytes_accessed"] > 0
    assert 0 < per["estimated_utilization"] < 1
    longest = max(per[f"{part}_seconds"] for part in ("compute", "memory", "interconnect"))
    assert longest == per[f"{per['bound_by']}_seconds"]
    assert per["estimated_seconds"] >= longest * (1 - 1e-9)
    assert all(each["count"] > 0 and each["bytes"] > 0 for each in per["collectives"].values())
    assert not per["uncounted_kernels"], "the work of a kernel is not counted"


@needs_libtpu
def test_data_parallelism_sums_every_gradient_once(compiled):
    """The prior's all-reduces carry its gradients and the metrics.

    Parameters that the loss does not read have no gradient.
    """
    summed = compiled["ladiff"]["per_device"]["collectives"]["all-reduce"]["bytes"]
    trained = preflight.parameter_bytes(abstract_parameters("ladiff"))
    assert 0.99 * trained <= summed < 1.2 * trained


@needs_libtpu
def test_fsdp_gathers_parameters_and_model_flops_are_at_most_the_programs(compiled):
    per = compiled["mdlm"]["per_device"]
    assert {"all-gather", "all-reduce"} <= per["collectives"].keys()
    assert per["model_flops"] <= per["flops"] < 2 * per["model_flops"]


def abstract_parameters(stage):
    """Shapes of the trained parameters of a stage of the small experiment, on one device."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    return preflight.AbstractExperiment(micro_config(**SMALL), mesh).restore(stage)


@pytest.mark.slow
@needs_libtpu
def test_the_command_writes_a_document_and_exits_with_3_if_the_program_does_not_fit(tmp_path):
    """The sampler of configs/tiny.py, with a small batch and with one too large for the chip."""
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
    """The batch grows with the number of chips, so the work per chip stays the same."""
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
def test_the_published_setting_fits_sixteen_v5e_chips(stage):
    done = compile_py(
        "--config=configs/owt.py", f"--stage={stage}", "--topology=v5e:4x4", timeout=1800
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
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
            "expected sizes whose product is the number of devices, 4",
            marks=needs_libtpu,
        ),
        pytest.param(
            [
                "--config=configs/tiny.py",
                "--topology=v5e:2x2",
                "--stage=mdlm",
                "--config.mdlm.batch=6",
            ],
            "config.mdlm.batch: got 6, expected a multiple of 4",
            marks=needs_libtpu,
        ),
        pytest.param(
            ["--config=configs/tiny.py", "--topology=v5e:2x2", "--sampler=gpt"],
            "sampler: got 'gpt'",
            marks=needs_libtpu,
        ),
    ],
)
@pytest.mark.slow
def test_bad_input_is_an_error_of_one_line(flags, message):
    done = compile_py(*flags)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_missing_compiler_is_an_error_of_one_line():
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


SLICES = """
import sys
sys.path[:0] = ["launch", "."]
import compile as command
command.find_libtpu()
from jax.experimental import topologies
from diladiff_jax.parallel import sharding
devices = topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:4x4", num_slices=2
).devices
mesh = sharding.make_mesh({"data": 2, "fsdp": 8, "tensor": 2}, devices)
print([sorted({device.slice_index for device in part.ravel()}) for part in mesh.devices])
pairs = mesh.devices.reshape(-1, 2)
print({max(abs(a - b) for a, b in zip(one.coords, other.coords)) for one, other in pairs})
try:
    sharding.make_mesh({"data": 1, "fsdp": 16, "tensor": 2}, devices)
except ValueError as error:
    print(error)
"""


@needs_libtpu
def test_only_the_data_axis_of_a_mesh_extends_over_several_slices():
    """On two slices of 16 chips, each data index is one slice, and tensor pairs are neighbours."""
    done = run("-c", SLICES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "[[0], [1]]",
        "{1}",
        "config.mesh.data: got 1, expected a multiple of the 2 slices, because only this axis may "
        "extend over several slices",
    ]
