"""The published setting with no outside file: a SentencePiece vocabulary trained on the corpus.

    python launch/prepare.py --config=configs/owt_sentencepiece.py --workdir=W
    python launch/train.py   --config=configs/owt_sentencepiece.py --workdir=W --stage=all
    python launch/train.py   --config=configs/owt_sentencepiece.py:/data/texts --workdir=W --stage=all

The part after the colon is a folder or glob of your own text in place of OpenWebText.
"""

from ml_collections import ConfigDict

from diladiff_jax.config import default_config


def get_config(files: str = "") -> ConfigDict:
    c = default_config()
    c.compute_dtype = "bfloat16"
    c.data.validation_fraction = 0.0125
    if files:
        c.data.update(corpus="text_files", files=files)
    c.tokenizer.update(kind="unigram", vocab_size=30_522)
    c.memory.update(
        scan=True, remat="matmuls"
    )  # 32 rows of 1,024 a chip in 16 GB; these two in parts:
    c.autoencoder.accumulate, c.diladiff.accumulate = 2, 8
    return c
