"""Backbones of one and of eight billion parameters: past one device's memory with their optimizer, so sharded over fsdp and tensor.

    python launch/train.py --config=configs/large.py --workdir=W --stage=all                        # 1 B, 8 chips: 1 x 4 x 2
    python launch/train.py --config=configs/large.py --workdir=W --stage=all --config.mesh.fsdp=16  # 32 chips
    python launch/train.py --config=configs/large.py:8b --workdir=W --stage=mdlm                    # 64 chips: 1 x 16 x 4

Heads, MLP and vocabulary are cut over `tensor`, the width over `fsdp`; `data` takes the devices that are left.
"""

from ml_collections import ConfigDict

from diladiff_jax.config import default_config


def get_config(size: str = "1b") -> ConfigDict:
    if size not in ("1b", "8b"):
        raise ValueError(f"the size is {size!r}; it must be 1b or 8b (configs/large.py:8b)")
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
    c.memory.update(scan=True, remat="full")
    return c
