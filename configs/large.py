"""Backbones of 1 and 8 billion parameters, for many accelerators.

With their optimizer states they do not fit on one device, so they are sharded over fsdp and tensor.

    python launch/train.py --config=configs/large.py --workdir=W --stage=all        # 1 B, 8 chips
    python launch/train.py --config=configs/large.py --workdir=W --stage=all --config.mesh.fsdp=16
    python launch/train.py --config=configs/large.py:8b --workdir=W --stage=mdlm    # 8 B, 64 chips

The part after the colon is the size, 1b or 8b. Heads, MLPs and the vocabulary are sharded over
`tensor`, and the width over `fsdp`; `data` takes the remaining devices. The second command is for
32 chips.
"""

from ml_collections import ConfigDict

from diladiff_jax.config import default_config


def get_config(size: str = "1b") -> ConfigDict:
    """Returns the config of a size, "1b" or "8b"."""
    if size not in ("1b", "8b"):
        raise ValueError(f"configs/large.py: got size {size!r}, expected 1b or 8b.")
    c = default_config()
    c.compute_dtype = "bfloat16"
    c.data.validation_fraction = 0.0125
    c.tokenizer.update(kind="unigram", vocab_size=32_768)
    if size == "1b":
        c.backbone.update(width=2048, num_layers=20, heads=16)
        c.encoder.update(latent_dim=1024, width=1024, heads=16)
        c.latent_denoiser.update(width=1536, num_layers=16, heads=16)
        c.mesh.update(data=-1, fsdp=4, tensor=2)
    else:
        c.backbone.update(width=4096, num_layers=40, heads=32)
        c.encoder.update(latent_dim=1024, width=2048, heads=16)
        c.latent_denoiser.update(width=2048, num_layers=24, heads=16)
        c.mesh.update(data=-1, fsdp=16, tensor=4)
    c.decoder.cross_layers = (0, c.backbone.num_layers - 1)
    # One compiled layer instead of 20 or 40, and activations that are re-computed instead of kept.
    c.memory.update(scan=True, remat="full")
    return c
