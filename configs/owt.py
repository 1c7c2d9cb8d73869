"""The published setting on OpenWebText (METHOD section 7), with the features of bert-base-uncased.

    python launch/prepare.py --config=configs/owt.py --workdir=W       # needs the network once: TFDS openwebtext
    python launch/train.py   --config=configs/owt.py --workdir=W --stage=all
    python launch/train.py   --config=configs/owt.py --workdir=W --stage=mdlm --config.mesh.fsdp=16

`--config.features.path` is a folder with BERT's config.json, vocab.txt and model.safetensors, or (as below) its hub name, whose
files are downloaded once and kept in W/features; `--config.tokenizer.file` is that vocab.txt. The paper's text says
bert-base-uncased (30,522 ids), its samples look like bert-base-cased; both load (cased with `--config.tokenizer.lowercase=False`).
"""

from ml_collections import ConfigDict

from diladiff_jax.config import default_config


def get_config() -> ConfigDict:
    c = default_config()  # the defaults are this setting
    c.compute_dtype = "bfloat16"  # the student stays in float32
    c.data.update(corpus="openwebtext", validation_last=100_000)
    c.tokenizer.update(kind="wordpiece", file="vocab.txt", lowercase=True)
    c.features.update(
        source="bert", path="bert-base-uncased"
    )  # the last layer, 768 wide; rows of 1,024 in three windows
    c.memory.update(
        scan=True, remat="matmuls"
    )  # 32 rows of 1,024 a chip in 16 GB; these two in parts:
    c.autoencoder.accumulate, c.diladiff.accumulate = 2, 8
    return c
