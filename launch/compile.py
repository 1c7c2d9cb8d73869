"""Compiles a training step or a sampler for TPUs that are not there, and says what it would need and how long it would take.

    python launch/compile.py --config=configs/owt.py --stage=mdlm --topology=v5e:4x4 --out=owt.json
    python launch/compile.py --config=configs/owt.py --sampler=diladiff --topology=v6e:2x2 --config.sampling.batch=64
    python launch/compile.py --config=configs/owt.py --stage=mdlm --topology=v5p --scaling=16,64,256,1024 --out=scaling.json

It needs no accelerator, workdir, data, tokenizer or weights; only libtpu, the TPU's compiler, which is looked for in
TPU_LIBRARY_PATH, among the installed packages, and in .venv/libtpu (where launch/test.sh puts it). Memory is the compiler's own
account of the compiled program. Time is a roofline: products, bytes and exchanges counted in that program, loops times their trips,
over the chip's published rates; an estimate, not a measurement. Of a conditional the dearest branch counts: an update of the prior is
one with self-conditioning, and a sampler's refresh_every and skip_layers save nothing here. Exit code 3: it does not fit the chip's memory.

With --scaling the same program is compiled for growing slices of one generation, each chip's share of the batch held as it is on
the first of them: bytes exchanged and estimated time by number of chips, and the knee, the first slice that takes 10% longer.
"""

import importlib.util
import os
import pathlib
import sys
from typing import Any

# Before jax is imported, and in this command alone: the machine's own devices are left to others, and libtpu asks for no TPU's metadata.
os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5litepod-16",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)
_LIBTPU = os.environ.pop(
    "TPU_LIBRARY_PATH", None
)  # jax would warn of one that leads nowhere, in several lines; see find_libtpu
for _name in ("TPU_MIN_LOG_LEVEL", "TPU_STDERR_LOG_LEVEL", "TF_CPP_MIN_LOG_LEVEL"):
    os.environ.setdefault(_name, "3")  # it complains of the missing accelerator

import cli
from absl import flags

_CONFIG = cli.config_flag(
    "Experiment file, e.g. configs/owt.py. --config.KEY=VALUE overrides a setting."
)
_STAGE = flags.DEFINE_string(
    "stage",
    None,
    "Training step to compile: mdlm, autoencoder, ladiff, diladiff, mdlm_long or scorer.",
)
_SAMPLER = flags.DEFINE_string(
    "sampler", None, "Or the sampler to compile: mdlm, mdlm_long, ladiff or diladiff."
)
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "Slice, as v5e:4x4, v6e:16x16, v4:4x4x4, v5p:4x4x8 or tpu7x:2x2x1; with --scaling the generation is enough.",
)
_SCALING = flags.DEFINE_list(
    "scaling", None, "Numbers of chips, e.g. 16,64,256,1024: compile for each."
)
_OUT = flags.DEFINE_string("out", None, "JSON file.")

DOES_NOT_FIT = 3
KNEE = 1.1  # times the time on the first slice


def main(argv: list[str]) -> None:
    from diladiff_jax import config as config_lib
    from diladiff_jax import preflight

    if cli.given(sys.argv, "config") is None:
        raise cli.UsageError("--config is missing; give an experiment file such as configs/owt.py")
    config = cli.experiment(_CONFIG)
    if (_STAGE.value is None) == (_SAMPLER.value is None):
        raise cli.UsageError(
            "give one of --stage=STAGE, whose training step is compiled, and --sampler=MODEL"
        )
    known = config_lib.STAGES + config_lib.BASELINES
    if _STAGE.value is not None and _STAGE.value not in known:
        raise cli.UsageError(f"--stage is {_STAGE.value!r}; it must be one of {', '.join(known)}")
    if _TOPOLOGY.value is None:
        raise cli.UsageError("--topology is missing; give a slice such as v5e:4x4")
    if _OUT.value is not None:
        cli.replaceable("out", pathlib.Path(_OUT.value), {"config", "stage"}, "such result")
    try:
        if _SCALING.value is None:
            slices = [preflight.parse_topology(_TOPOLOGY.value)]
        else:
            generation = _TOPOLOGY.value.partition(":")[0]
            slices = [preflight.slice_of(generation, _chips(text)) for text in _SCALING.value]
    except preflight.TopologyError as error:
        raise cli.UsageError(str(error)) from None
    find_libtpu()

    rows: list[dict[str, Any]] = []
    for where in slices:
        rows.append(
            compiled(
                config,
                where,
                slices[0],
                stage=_STAGE.value,
                sampler=_SAMPLER.value,
                source=cli.given(sys.argv, "config"),
            )
        )
        print(
            table(rows[-1])
            if _SCALING.value is None
            else scaling_line(rows[-1], rows[0], header=len(rows) == 1),
            flush=True,
        )
    document: dict[str, Any] = rows[0]
    if _SCALING.value is not None:
        document = {
            "config": rows[0]["config"],
            "stage": rows[0]["stage"],
            "rows": rows,
            "knee": knee(rows),
        }
        print(said_of_knee(rows))
    if _OUT.value is not None:
        cli.write_json("out", pathlib.Path(_OUT.value), document)
        print(f"written to {_OUT.value}")
    missing = [row["topology"] for row in rows if not row["fits"]]
    if missing:
        print(f"error: {rows[0]['stage']} does not fit on {', '.join(missing)}", file=sys.stderr)
        raise SystemExit(DOES_NOT_FIT)


def compiled(
    config: Any, where: Any, first: Any, *, stage: str | None, sampler: str | None, source: str
) -> dict[str, Any]:
    """One document: the step of a stage, or a sampler, compiled for a slice, its batch growing with the slice from the `first` one on."""
    import jax
    from jax.experimental import topologies

    from diladiff_jax import config as config_lib
    from diladiff_jax import preflight

    try:
        options = (
            {"chip_config_name": "megacore"} if where.generation == "v4" else {}
        )  # one device a chip, as v5p has by itself
        if where.chips == 1:
            options["chips_per_host_bounds"] = [1, 1, 1]
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=where.name, **options
        ).devices
    except (RuntimeError, ValueError) as error:
        raise cli.UsageError(
            f"topology {where.name} is refused by the TPU compiler: {str(error).strip().splitlines()[0]}"
        ) from None
    if len(devices) != where.chips * where.chip.devices:
        raise cli.UsageError(
            f"topology {where.name} has {len(devices)} devices, where {where.chips * where.chip.devices} were expected; another libtpu may know it better"
        )
    block = stage or "sampling"
    batch = config[block].batch * where.chips // first.chips
    config = config_lib.resolve(
        config.to_dict() | {block: config[block].to_dict() | {"batch": batch}}
    )
    mesh = preflight.device_mesh(config, devices)
    experiment = preflight.AbstractExperiment(config, mesh)
    if stage:
        program = preflight.train_step_program(experiment, stage)
    else:
        program = preflight.sampler_program(experiment, sampler)
    try:
        found = preflight.measure(program, where, mesh)
    except preflight.CompileError as error:
        raise cli.UsageError(
            f"{where.name}: the TPU compiler refuses this program: {error}"
        ) from None
    jax.clear_caches()  # each slice's program is compiled once; they are large
    return {
        "config": source,
        "stage": stage or f"{sampler} sampler",
        "topology": where.name,
        "devices": len(devices),
        "chips": where.chips,
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        "batch": program.batch,
        **found,
    }


def find_libtpu() -> None:
    """Points JAX to libtpu: TPU_LIBRARY_PATH, else the installed package, else .venv/libtpu of this checkout.

    Raises:
      UsageError: it is nowhere.
    """
    if _LIBTPU:
        if not os.path.isfile(_LIBTPU):
            raise cli.UsageError(
                f"TPU_LIBRARY_PATH is {_LIBTPU}, which is no file; it must be a libtpu.so"
            )
        os.environ["TPU_LIBRARY_PATH"] = _LIBTPU
        return
    package = importlib.util.find_spec("libtpu")
    folders = (
        [pathlib.Path(place) for place in (package.submodule_search_locations or [])]
        if package
        else []
    )
    for folder in [*folders, cli.ROOT / ".venv" / "libtpu" / "libtpu"]:
        if (folder / "libtpu.so").is_file():
            os.environ["TPU_LIBRARY_PATH"] = str(folder / "libtpu.so")
            return
    raise cli.UsageError(
        "libtpu, the TPU compiler, is not here; `source launch/environment.sh; setup_libtpu` puts it in .venv/libtpu, or set TPU_LIBRARY_PATH"
    )


def table(row: dict[str, Any]) -> str:
    """What a person reads of one program."""
    per = row["per_device"]
    mesh = " x ".join(f"{name} {size}" for name, size in row["mesh"].items())
    lines = [
        f"{row['stage']} of {row['config']} on {row['topology']}, {row['devices']} devices ({mesh}), batch {row['batch']}; for each device:",
        f"  parameters    {_bytes(per['parameter_bytes'])}",
        f"  peak memory   {_bytes(per['peak_bytes'])} of {_bytes(per['capacity_bytes'])}: {'fits' if row['fits'] else 'DOES NOT FIT'}",
    ]
    if per["flops"] is None:
        return "\n".join(lines)
    lines += [
        f"  products      {per['flops']:.4g} FLOPs, of which the model needs {per['model_flops']:.4g}",
        f"  main memory   {_bytes(per['bytes_accessed'])} to and fro",
        *(
            f"  {kind:<22} {each['count']:8.0f} times {_bytes(each['bytes'])}"
            for kind, each in per["collectives"].items()
        ),
        *(
            f"  not counted   kernel {name}, {count:.0f} times"
            for name, count in per["uncounted_kernels"].items()
        ),
        f"  roofline      {_seconds(per['estimated_seconds'])}: compute {_seconds(per['compute_seconds'])}, memory {_seconds(per['memory_seconds'])}, "
        f"interconnect {_seconds(per['interconnect_seconds'])} ({_seconds(per['exposed_interconnect_seconds'])} of it not overlapped)",
        f"  bound by      {per['bound_by']}; utilization {per['estimated_utilization']:.1%} at that time",
    ]
    return "\n".join(lines)


def scaling_line(row: dict[str, Any], first: dict[str, Any], *, header: bool) -> str:
    """One slice of a scaling table."""
    per = row["per_device"]
    titles = f"{'slice':<16}{'chips':>6}{'batch':>8}{'peak memory':>14}{'exchanged':>14}{'interconnect':>14}{'step':>12}{'efficiency':>12}  bound by"
    line = f"{row['topology']:<16}{row['chips']:>6}{row['batch']:>8}{_bytes(per['peak_bytes']):>14}"
    if per["flops"] is None:
        line += "  does not fit"
    else:
        exchanged = sum(each["bytes"] for each in per["collectives"].values())
        base = first["per_device"]["estimated_seconds"]
        efficiency = f"{base / per['estimated_seconds']:.1%}" if base else ""
        line += f"{_bytes(exchanged):>14}{_seconds(per['interconnect_seconds']):>14}{_seconds(per['estimated_seconds']):>12}{efficiency:>12}  {per['bound_by']}"
    return (titles + "\n" if header else "") + line


def knee(rows: list[dict[str, Any]]) -> str | None:
    """The first slice that takes `KNEE` times as long as the first one; None if none does."""
    times = [
        (row["topology"], row["per_device"]["estimated_seconds"])
        for row in rows
        if row["per_device"]["estimated_seconds"] is not None
    ]
    return next((name for name, seconds in times if seconds > KNEE * times[0][1]), None)


def said_of_knee(rows: list[dict[str, Any]]) -> str:
    """The knee in a sentence."""
    found = knee(rows)
    if found is None:
        return f"no knee: up to {rows[-1]['chips']} chips no slice is estimated to take {KNEE - 1:.0%} longer than {rows[0]['topology']}"
    return f"knee: {found} is the first slice estimated to take {KNEE - 1:.0%} longer than {rows[0]['topology']}"


def _chips(text: str) -> int:
    if not text.strip().isdigit():
        raise cli.UsageError(
            f"--scaling holds {text!r}; it must be numbers of chips such as 16,64,256"
        )
    return int(text)


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{value:.4g} {unit}"
        value /= 1024
    raise AssertionError


def _seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


if __name__ == "__main__":
    cli.run(main, __doc__)
