"""A model of English for one GPU: an MDLM of 17 million parameters, 25 to 30 with its decoder.

    python launch/train.py --config=configs/english.py:/texts --workdir=W --stage=all
    python launch/train.py --config=configs/english.py:/texts --workdir=W --init_from=BUNDLE \\
        --stage=autoencoder

The part after the colon is a folder or file of text. With `--init_from` a stage starts from a
trained MDLM, which has to have the same backbone and tokenizer. docs/results.md says what the
autoencoder and the prior gave after a third of these updates; the student has not been trained
with this config yet.
"""

from ml_collections import ConfigDict

from diladiff_jax.config import default_config


def get_config(files: str = "texts") -> ConfigDict:
    """Returns the config for a folder or file of text."""
    c = default_config()
    c.compute_dtype = c.features.compute_dtype = "bfloat16"
    c.memory.scan = True
    c.data.update(corpus="text_files", files=files, length=128, packing="packed")
    c.data.update(validation_fraction=0.01, scorer_fraction=0.01)
    c.tokenizer.update(kind="unigram", vocab_size=8192)
    c.features.with_embeddings = True
    c.backbone.update(width=384, num_layers=6, heads=6, embedding_std=1.0)
    c.encoder.update(num_latents=8, latent_dim=16, width=384, heads=6, num_layers=2, dropout=0.0)
    c.decoder.cross_layers = (0, 2, 4)
    c.latent_denoiser.update(
        width=256,
        num_layers=6,
        heads=4,
        mlp_ratio=2.75,
        max_frequency=8.0,
        max_period=10.0,
        learned_positions=True,
    )
    c.scorer_network.update(width=384, num_layers=6, heads=6)
    c.diffusion.d = 1.0
    denoisers = (c.mdlm, c.mdlm_long, c.autoregressive, c.scorer)
    for stage in (*denoisers, c.autoencoder, c.ladiff, c.diladiff):
        stage.update(
            batch=512,
            optimizer="muon",
            schedule="linear",
            final_ratio=0.05,
            warmup=50,
            b2=0.95,
            epsilon=1e-8,
            weight_decay=0.0,
        )
    for stage in denoisers:
        stage.update(steps=4000, learning_rate=3e-3, muon_learning_rate=0.02, ema=0.995)
    # At most 8 x 16 x log2(1 / 0.3) = 222 bits: predicting a latent that stores the whole
    # text would be as hard as language modelling.
    c.autoencoder.update(
        steps=2500,
        learning_rate=2e-3,
        muon_learning_rate=0.015,
        decoder_warmup=200,
        final_ratio=0.0,
        clip=10.0,
        noise=0.3,
        p_feat=0.3,
        latent_augmentation="noise",
        latent_noise_low=0.3,
        latent_noise_high=0.9,
        p_drop=0.2,
    )
    c.mdlm_long.update(steps=c.autoencoder.steps, final_ratio=0.0)
    c.autoregressive.update(steps=c.mdlm.steps + c.autoencoder.steps, final_ratio=0.0)
    c.ladiff.update(steps=8000, learning_rate=3e-3, muon_learning_rate=0.03, ema=0.998)
    c.diladiff.update(
        steps=3000,
        learning_rate=1e-3,
        muon_learning_rate=0.01,
        ema=0.998,
        distillation="progressive",
        step_form="rotation",
        self_conditioning=0.0,
    )
    c.sampling.update(
        batch=64,
        decode_steps=8,
        prior_method="ddim",
        prior_steps=50,
        eta=1.0,
        student_steps=4,
        student_self_conditioning="none",
        gamma=0.0,
    )
    c.evaluation.update(
        samples=1024, decode_steps=(1, 2, 4, 8, 16, 32, 64, 128), control_steps=(1, 4, 8, 16)
    )
    c.logging.update(
        metrics_every=100, validate_every=1000, validation_batches=4, checkpoint_every=1000
    )
    return c
