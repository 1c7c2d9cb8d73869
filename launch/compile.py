"""Compiles a training update or a sampler for TPUs, without any TPU, and estimates its cost.

    python launch/compile.py --config=configs/owt.py --stage=mdlm --topology=v5e:4x4 --out=owt.json
    python launch/compile.py --config=configs/owt.py --sampler=diladiff --topology=v6e:2x2
    python launch/compile.py --config=configs/owt.py --stage=mdlm --topology=v5p \\
        --scaling=16,64,256,1024 --out=scaling.json

It needs no accelerator, workdir, data, tokenizer or weights; only libtpu, the TPU compiler, which
it looks for in TPU_LIBRARY_PATH, among the installed packages, and in .venv/libtpu (where
launch/test.sh installs it).

Memory is what the compiler reports for the program. Time is a roofline estimate, not a measurement:
the products, bytes and exchanges of the program, with loops counted by their trips, at the chip's
published rates. For a conditional the most expensive branch counts, so an update of the prior is
one with self-conditioning, and a sampler's refresh_every and skip_layers save nothing here. The
exit code is 3 if the program does not fit into the chip's memory.

With --scaling the program is compiled for growing slices of one generation, with the same batch per
chip on all. The table shows the bytes exchanged and the estimated time by number of chips, and the
knee: the first slice that takes 10% longer than the first one.
"""

import importlib.util
import os
import pathlib
import sys
from typing import Any

# Before jax is imported: this command leaves the machine's own devices to others, and libtpu must
# not ask for the metadata of a TPU.
os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5litepod-16",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)
# Removed until `find_libtpu` has checked it: JAX prints several lines if it is not a file.
_LIBTPU = os.environ.pop("TPU_LIBRARY_PATH", None)
for _name in ("TPU_MIN_LOG_LEVEL", "TPU_STDERR_LOG_LEVEL", "TF_CPP_MIN_LOG_LEVEL"):
    os.environ.setdefault(_name, "3")  # libtpu warns that there is no accelerator

import cli  # noqa: E402  (after the environment is set, which jax reads on import)
from absl import flags  # noqa: E402

_CONFIG = cli.config_flag(
    "Experiment file, such as configs/owt.py. --config.KEY=VALUE overrides a setting."
)
_STAGE = flags.DEFINE_string(
    "stage",
    None,
    "Stage whose training update is compiled: one of {stages}. Give either --stage or --sampler.",
)
_SAMPLER = flags.DEFINE_string("sampler", None, "Model whose sampler is compiled: one of {models}.")
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "Slice to compile for, such as v5e:4x4, v6e:16x16, v4:4x4x4, v5p:4x4x8 or tpu7x:2x2x1; with"
    " --scaling the generation is enough.",
)
_SCALING = flags.DEFINE_list(
    "scaling", None, "Numbers of chips to compile for, such as 16,64,256,1024."
)
_OUT = flags.DEFINE_string(
    "out", None, "JSON file to write the results to; default: only print them."
)

DOES_NOT_FIT = 3


def main(argv: list[str]) -> None:
    from diladiff_jax.console import say
    from diladiff_jax.preflight import report

    config = _checked_config()
    if _OUT.value is not None:
        cli.check_replaceable(
            "out", pathlib.Path(_OUT.value), {"config", "stage"}, "a result of compile.py"
        )
    slices = _slices()
    find_libtpu()
    rows: list[dict[str, Any]] = []
    for where in slices:
        source = cli.flag_value(sys.argv, "config")
        rows.append(
            compiled(
                config,
                where,
                slices[0],
                stage=_STAGE.value,
                sampler=_SAMPLER.value,
                source=source,
            )
        )
        if _SCALING.value is None:
            say(report.describe(rows[-1]))
        else:
            header = [report.scaling_header()] if len(rows) == 1 else []
            say("\n".join([*header, report.scaling_line(rows[-1], rows[0])]))
    document = rows[0]
    if _SCALING.value is not None:
        document = {name: rows[0][name] for name in ("config", "stage")}
        document |= {"rows": rows, "knee": report.knee(rows)}
        say(report.describe_knee(rows))
    if _OUT.value is not None:
        cli.write_json("out", pathlib.Path(_OUT.value), document)
        say(f"written to {_OUT.value}")
    too_small = [row["topology"] for row in rows if not row["fits"]]
    if too_small:
        say(f"error: {rows[0]['stage']} does not fit on {', '.join(too_small)}", error=True)
        raise SystemExit(DOES_NOT_FIT)


def compiled(
    config: Any, where: Any, first: Any, *, stage: str | None, sampler: str | None, source: Any
) -> dict[str, Any]:
    """`compile_for_slice`, with a rejection by the TPU compiler as a UsageError."""
    from diladiff_jax import preflight
    from diladiff_jax.preflight import document

    try:
        return document.compile_for_slice(
            config, where, first, stage=stage, sampler=sampler, source=source
        )
    except preflight.TopologyError as error:
        raise cli.UsageError(f"--topology: {str(error).removeprefix('topology: ')}") from None
    except preflight.CompileError as error:
        raise cli.UsageError(
            f"--topology={where.name}: the TPU compiler rejects this program: {error}"
        ) from None


def find_libtpu() -> None:
    """Points JAX to libtpu: TPU_LIBRARY_PATH, the installed package, or .venv/libtpu.

    Raises:
      UsageError: it is in none of these places.
    """
    if _LIBTPU:
        if not os.path.isfile(_LIBTPU):
            raise cli.UsageError(
                f"TPU_LIBRARY_PATH: got {_LIBTPU}, which is not a file, expected a libtpu.so."
            )
        os.environ["TPU_LIBRARY_PATH"] = _LIBTPU
        return
    package = importlib.util.find_spec("libtpu")
    places = (package.submodule_search_locations or []) if package else []
    folders = [pathlib.Path(place) for place in places]
    for folder in [*folders, cli.ROOT / ".venv" / "libtpu" / "libtpu"]:
        if (folder / "libtpu.so").is_file():
            os.environ["TPU_LIBRARY_PATH"] = str(folder / "libtpu.so")
            return
    raise cli.UsageError(
        "libtpu, the TPU compiler, is not installed. Run `source launch/environment.sh;"
        " setup_libtpu`, which installs it in .venv/libtpu, or set TPU_LIBRARY_PATH."
    )


def _checked_config() -> Any:
    """The config, after the flags that say what to compile are checked."""
    from diladiff_jax import stages

    if cli.flag_value(sys.argv, "config") is None:
        raise cli.UsageError("--config is missing. Give an experiment file such as configs/owt.py.")
    config = cli.load_config(_CONFIG)
    if (_STAGE.value is None) == (_SAMPLER.value is None):
        raise cli.UsageError(
            "give one of --stage=STAGE, to compile its training update, and"
            " --sampler=MODEL, but not both."
        )
    if _STAGE.value is not None:
        cli.require_one_of("stage", _STAGE.value, stages.STAGES)
    if _SAMPLER.value is not None:
        cli.require_one_of("sampler", _SAMPLER.value, stages.sampled_models())
    if _TOPOLOGY.value is None:
        raise cli.UsageError("--topology is missing. Give a slice such as v5e:4x4.")
    return config


def _slices() -> list[Any]:
    """The slices to compile for, the smallest first."""
    from diladiff_jax import preflight

    try:
        if _SCALING.value is None:
            return [preflight.parse_topology(_TOPOLOGY.value)]
        generation = _TOPOLOGY.value.partition(":")[0]
        return [preflight.slice_of(generation, _chips(text)) for text in _SCALING.value]
    except preflight.TopologyError as error:
        raise cli.UsageError(f"--topology: {str(error).removeprefix('topology: ')}") from None


def _chips(text: str) -> int:
    if not text.strip().isdigit():
        raise cli.UsageError(
            f"--scaling: got {text!r}, expected numbers of chips such as 16,64,256."
        )
    return int(text)


if __name__ == "__main__":
    cli.run(main, __doc__)
