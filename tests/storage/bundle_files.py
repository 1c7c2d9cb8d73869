"""Reading bundles as users do, and rewriting them as a stranger would."""

import contextlib
import hashlib
import json

from safetensors.numpy import load_file, save_file

import diladiff_jax as dl
from diladiff_jax.parallel import sharding

NOT_JSON = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError)


def mesh_of(data, fsdp, tensor):
    return sharding.make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor})


def read(folder, stages=("mdlm", "autoencoder")):
    """Reads what a user would. Two stages suffice: tracing each for its shapes takes seconds."""
    model = dl.load(folder)
    for stage in stages:
        model.trained(stage)
    return model.statistics


def update_hashes(folder):
    """Makes the hashes in the manifest, and the tokenizer's own, those of the current files."""
    with contextlib.suppress(*NOT_JSON):
        record = json.loads((folder / "tokenizer/tokenizer.json").read_text())
        record["sha256"] = {
            name: hashlib.sha256((folder / "tokenizer" / name).read_bytes()).hexdigest()
            for name in record["sha256"]
        }
        (folder / "tokenizer/tokenizer.json").write_text(json.dumps(record))
    manifest = read_manifest(folder)
    for name in manifest["files"]:
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            manifest["files"][name] = {
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
    write_manifest(folder, manifest)


def read_manifest(folder):
    return json.loads((folder / "bundle.json").read_text())


def write_manifest(folder, manifest):
    (folder / "bundle.json").write_text(json.dumps(manifest))


def rewrite_tensors(folder, name, change):
    """Applies `change` to the tensors of a file; hashes stay as they were."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
