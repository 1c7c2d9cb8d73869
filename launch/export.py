"""Writes a trained workdir as a bundle: one folder of safetensors, JSON and the tokenizer, to publish or to serve from.

    python launch/export.py --workdir=runs/stories --out=bundles/stories
    python launch/export.py --workdir=W --out=B --model=diladiff --dtype=bfloat16   # what one model needs, in half the bytes
    python launch/sample.py --workdir=B                                             # a bundle stands where a workdir can

Every file's size and SHA-256 are in bundle.json, and held against it when the bundle is read. `dl.load(B)` opens it as a library, and
`launch/train.py --init_from=B` trains on from it.
"""

import cli
from absl import flags

_CONFIG = cli.experiment_flags()
_OUT = flags.DEFINE_string("out", None, "Folder to make; it must not exist.")
_MODEL = flags.DEFINE_string(
    "model",
    None,
    "diladiff, ladiff, mdlm or mdlm_long: only the stages that it samples and encodes with; default all that are trained.",
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "bfloat16"],
    "Of matrices; gains, biases and statistics stay in float32.",
)


def main(argv: list[str]) -> None:
    import jax.numpy as jnp

    import diladiff_jax as dl
    from diladiff_jax.model import NEEDED
    from diladiff_jax.objectives.build import features_source
    from diladiff_jax.parallel import sharding
    from diladiff_jax.storage import bundles

    if not _OUT.value:
        raise cli.UsageError("--out is missing; give the bundle's folder, --out=DIR")
    if _MODEL.value is not None and _MODEL.value not in NEEDED:
        raise cli.UsageError(f"--model is {_MODEL.value!r}; it must be one of {', '.join(NEEDED)}")
    mesh = sharding.make_mesh(
        {"data": 1, "fsdp": -1, "tensor": 1}
    )  # parameters cut over all devices at hand
    experiment = dl.load(flags.FLAGS.workdir, config=cli.experiment(_CONFIG), mesh=mesh).experiment
    stages = None
    if _MODEL.value is not None:
        stages = NEEDED[_MODEL.value]
        if (
            "autoencoder" in stages and features_source(experiment.settings) == "mdlm"
        ):  # the encoder reads its features
            stages = ("mdlm", *stages)
    out = bundles.export(experiment, _OUT.value, stages=stages, dtype=jnp.dtype(_DTYPE.value))
    files = [path for path in out.rglob("*") if path.is_file()]
    print(f"{len(files)} files, {sum(path.stat().st_size for path in files):,} bytes: {out}")


if __name__ == "__main__":
    cli.run(main, __doc__)
