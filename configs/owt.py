"""The published setting on OpenWebText, with the features of bert-base-uncased.

    # Downloads the corpus once; vocab.txt is a file of bert-base-uncased on the Hugging Face hub.
    python launch/prepare.py --config=configs/owt.py --workdir=W \\
        --config.tokenizer.file=/path/to/vocab.txt
    python launch/train.py --workdir=W --stage=all        # the workdir keeps the settings
    python launch/train.py --workdir=W --stage=mdlm --config.mesh.fsdp=16

docs/method.md lists the setting under "Published settings".

`--config.features.path` is a folder with BERT's config.json, vocab.txt and model.safetensors, or
(the default here) its hub name, whose files are downloaded once and kept in W/features.
`--config.tokenizer.file` is the encoder's vocab.txt (by default, in the current folder). The
paper's text says bert-base-uncased (30,522 ids), but its samples look like bert-base-cased; both
work, the cased one with `--config.tokenizer.lowercase=False`.
"""

from ml_collections import ConfigDict

from diladiff_jax.config import default_config


def get_config() -> ConfigDict:
    """Returns the config."""
    c = default_config()  # the defaults are the published setting
    c.compute_dtype = "bfloat16"  # the student is trained in float32
    c.data.update(corpus="openwebtext", validation_last=100_000)
    c.tokenizer.update(kind="wordpiece", file="vocab.txt", lowercase=True)
    # The last layer, of width 768. BERT has 512 positions, so it reads a text of 1,024 tokens in
    # three windows.
    c.features.update(source="bert", path="bert-base-uncased")
    # So that 32 texts of 1,024 tokens per chip fit into 16 GB. These two stages need more memory
    # than that, so they divide their batches into microbatches.
    c.memory.update(scan=True, remat="matmuls")
    c.autoencoder.accumulate, c.diladiff.accumulate = 2, 8
    return c
