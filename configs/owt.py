"""The published setting on OpenWebText (METHOD section 7), with the pretrained denoiser's own features.

    python launch/prepare.py --config=configs/owt.py --workdir=W       # needs the network once: TFDS openwebtext
    python launch/train.py   --config=configs/owt.py --workdir=W --stage=all
    python launch/train.py   --config=configs/owt.py --workdir=W --stage=mdlm --config.mesh.fsdp=16

`--config.tokenizer.file` names BERT's vocabulary: the paper's text says bert-base-uncased (30,522 ids), its
samples look like bert-base-cased; both load.
"""

from ml_collections import ConfigDict

from diladiff_jax.config import default_config


def get_config() -> ConfigDict:
    c = default_config()  # the defaults are this setting
    c.compute_dtype = "bfloat16"  # the student stays in float32
    c.data.update(corpus="openwebtext", validation_fraction=0.0125)  # about 100,000 of the 8 M documents
    c.tokenizer.update(kind="wordpiece", file="vocab.txt", lowercase=True)
    return c
