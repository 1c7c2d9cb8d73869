"""The published setting without any published encoder or vocabulary.

The features are the pretrained denoiser's own hidden states, and the SentencePiece vocabulary is
trained on the corpus.

    python launch/prepare.py --config=configs/owt_sentencepiece.py --workdir=W
    python launch/train.py   --config=configs/owt_sentencepiece.py --workdir=W --stage=all
    python launch/train.py   --config=configs/owt_sentencepiece.py:/texts --workdir=W --stage=all

The part after the colon is a folder or glob of your own text instead of OpenWebText.
"""

from ml_collections import ConfigDict

from diladiff_jax.config import default_config


def get_config(files: str = "") -> ConfigDict:
    """Returns the config for OpenWebText, or for a folder or glob of text files."""
    c = default_config()
    c.compute_dtype = "bfloat16"
    c.data.validation_fraction = 0.0125
    if files:
        c.data.update(corpus="text_files", files=files)
    c.tokenizer.update(kind="unigram", vocab_size=30_522)  # as many pieces as bert-base-uncased
    # So that 32 texts of 1,024 tokens per chip fit into 16 GB. These two stages need more memory
    # than that, so they divide their batches into microbatches.
    c.memory.update(scan=True, remat="matmuls")
    c.autoencoder.accumulate, c.diladiff.accumulate = 2, 8
    return c
