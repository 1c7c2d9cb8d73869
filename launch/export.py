"""Exports a trained workdir as a bundle: one folder with safetensors, JSON and the tokenizer.

    python launch/export.py --workdir=runs/stories --out=bundles/stories
    python launch/export.py --workdir=W --out=B --model=diladiff --dtype=bfloat16
    python launch/sample.py --workdir=B      # sample.py reads bundles as well as workdirs

bundle.json records the size and SHA-256 of every file; they are checked when the bundle is read.
`dl.load(B)` loads the bundle in Python, and `launch/train.py --init_from=B` trains from it.
"""

import cli
from absl import flags

_CONFIG = cli.experiment_flags()
_OUT = flags.DEFINE_string("out", None, "Folder to create; it must not exist yet.")
_MODEL = flags.DEFINE_string(
    "model",
    None,
    "Export only the stages that this model samples and encodes with: one of {models}; default: all"
    " stages that are trained.",
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "bfloat16"],
    "Type of the matrices; gains, biases and statistics are always float32.",
)


def main(argv: list[str]) -> None:
    import jax.numpy as jnp

    import diladiff_jax as dl
    from diladiff_jax.console import say
    from diladiff_jax.parallel import make_mesh
    from diladiff_jax.stages import ENCODER, MODELS, features_source, sampled_models
    from diladiff_jax.storage import bundles

    if not _OUT.value:
        raise cli.UsageError("--out is missing. Give the folder of the bundle, --out=DIR.")
    if _MODEL.value is not None:
        cli.require_one_of("model", _MODEL.value, sampled_models())
    # Parameters are sharded over all devices of this machine.
    mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
    model = dl.load(flags.FLAGS.workdir, config=cli.load_config(_CONFIG), mesh=mesh)
    stages = None
    if _MODEL.value is not None:
        stages = MODELS[_MODEL.value].stages
        # The encoder reads the MDLM's features.
        if ENCODER[0] in stages and features_source(model.experiment.settings) == "mdlm":
            stages = ("mdlm", *stages)
    out = bundles.export(model.experiment, _OUT.value, stages=stages, dtype=jnp.dtype(_DTYPE.value))
    files = [path for path in out.rglob("*") if path.is_file()]
    say(f"{len(files)} files, {sum(path.stat().st_size for path in files):,} bytes: {out}")


if __name__ == "__main__":
    cli.run(main, __doc__)
