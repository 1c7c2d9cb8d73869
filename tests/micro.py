"""The smallest experiment that runs every stage: a few steps each, on a few stories."""

from diladiff_jax.config import resolve
from diladiff_jax.stages import STAGES


def micro_config(**changes):
    """A checked experiment of width 16; `changes` are blocks that override its own."""
    stage = dict(
        batch=16,
        learning_rate=3e-3,
        muon_learning_rate=0.02,
        warmup=2,
        ema=0.9,
        schedule="linear",
        final_ratio=0.1,
    )
    given = dict(
        data=dict(
            corpus="stories",
            documents=300,
            validation_documents=40,
            scorer_documents=60,
            length=32,
            packing="document",
        ),
        tokenizer=dict(kind="unigram", vocab_size=512, whole_words=140),
        features=dict(with_embeddings=True),
        backbone=dict(width=16, num_layers=2, heads=2),
        encoder=dict(num_latents=4, latent_dim=8, width=16, heads=2, num_layers=1),
        decoder=dict(cross_layers=(0, 1)),
        latent_denoiser=dict(width=16, num_layers=2, heads=2),
        scorer_network=dict(width=16, num_layers=1, heads=2),
        diffusion=dict(d=1.0),
        sampling=dict(
            batch=16, decode_steps=4, prior_steps=4, student_steps=2, prior_method="ddim"
        ),
        evaluation=dict(samples=24, decode_steps=(1, 4), control_steps=(2,), bound_draws=2),
        logging=dict(
            metrics_every=2, validate_every=4, validation_batches=2, checkpoint_every=3, samples=0
        ),
    )
    for name in STAGES:
        given[name] = stage | dict(steps=6)
    given["mdlm"] |= dict(optimizer="muon")  # slow to compile, so one stage only
    given["autoencoder"] |= dict(ema=0.0, decoder_warmup=2)
    given["diladiff"] |= dict(tangent_warmup=2, step_form="rotation", p_noise=0.2, p_clean=0.3)
    for block, values in changes.items():
        given[block] = given.get(block, {}) | values if isinstance(values, dict) else values
    return resolve(given)
