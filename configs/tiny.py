"""All four stages at tiny size, for two CPU cores, on a corpus that every machine has.

    bash launch/quickstart.sh runs/tiny                      # everything, with a report
    python launch/train.py --config=configs/tiny.py --workdir=runs/tiny --stage=all
    python launch/train.py --config=configs/tiny.py:pydocs --workdir=runs/pydocs --stage=all
    python launch/train.py --config=configs/tiny.py:/my/texts --workdir=runs/mine --stage=all

The part after the colon is the corpus: `stories` (the default, a probabilistic grammar with exact
oracles), `pydocs` (the documentation of this Python), or a folder, glob or file of text. Training
takes about 20 minutes.
"""

from ml_collections import ConfigDict

from diladiff_jax.config import default_config


def get_config(corpus: str = "stories") -> ConfigDict:
    """Returns the config for a corpus: "stories", "pydocs", or a path of text."""
    c = default_config()
    if corpus == "stories":
        _stories(c)
    else:
        _real_text(c, corpus)

    # At this size Muon learns to copy a detail from one place to another several times faster than
    # AdamW.
    denoisers = (c.mdlm, c.mdlm_long, c.autoregressive, c.scorer)
    for stage in (*denoisers, c.autoencoder, c.ladiff, c.diladiff):
        stage.update(
            optimizer="muon",
            schedule="linear",
            final_ratio=0.1,
            warmup=20,
            b2=0.95,
            epsilon=1e-8,
            weight_decay=0.0,
        )
    for stage in denoisers:
        stage.update(learning_rate=3e-3, muon_learning_rate=0.02, ema=0.99)
    # The embedding of a word must not drown in the output of the first block, which is of order 1.
    # With the default of 0.02, the MDLM and then the autoencoder need twice as many steps until
    # they copy details.
    c.backbone.embedding_std = 1.0
    # Each latent has a role of its own. With learned positions the prior learns three times as fast
    # as with relative distances only.
    c.latent_denoiser.learned_positions = True
    c.autoencoder.update(
        learning_rate=3e-3, muon_learning_rate=0.02, decoder_warmup=60, final_ratio=0.0
    )
    # This control has the same budget as the decoder: the MDLM, trained for as many further steps
    # as the autoencoder, with the same final learning rate.
    c.mdlm_long.update(steps=c.autoencoder.steps, final_ratio=c.autoencoder.final_ratio)
    c.ladiff.update(learning_rate=6e-3, muon_learning_rate=0.05, ema=0.99)
    # Rotation makes the student start as the teacher's DDIM sampler.
    c.diladiff.update(ema=0.99, step_form="rotation")
    c.sampling.update(prior_method="ddim")
    return c


def _stories(c: ConfigDict) -> None:
    c.data.update(
        corpus="stories",
        documents=60_000,
        validation_documents=2_000,
        length=32,
        packing="document",
    )
    # The language has 139 words and marks, and each gets a piece of its own.
    c.tokenizer.update(kind="unigram", vocab_size=512, whole_words=140)
    c.features.with_embeddings = True  # which word it is, in addition to its context
    c.backbone.update(width=96, num_layers=3, heads=4)
    c.encoder.update(num_latents=16, latent_dim=32, width=96, heads=4, num_layers=2)
    c.decoder.cross_layers = (0, 2)
    c.latent_denoiser.update(
        width=128, num_layers=3, heads=4, mlp_ratio=2.75, max_frequency=8.0, max_period=10.0
    )
    c.scorer_network.update(width=96, num_layers=3, heads=4)
    c.diffusion.d = 1.0  # with 10, latents of this width are almost pure noise most of the time
    for stage in (c.mdlm, c.mdlm_long, c.autoregressive, c.autoencoder, c.ladiff, c.diladiff):
        stage.batch = 128
    c.mdlm.steps, c.autoencoder.steps, c.ladiff.steps, c.diladiff.steps = 350, 450, 2000, 300
    # Noise on the latent makes what it says easier to hit for the prior. Some latents have to reach
    # the decoder as they are: with noise on all that p_drop leaves, the autoencoder learns the last
    # details too late. docs/results.md has the figures of both, and of the paper's augmentation.
    c.autoencoder.update(
        noise=0.3,
        p_feat=0.3,
        latent_augmentation="noise",
        p_drop=0.25,
        p_latent_noise=2 / 3,
    )
    c.diladiff.update(
        distillation="progressive",
        self_conditioning=0.0,
        learning_rate=1e-3,
        muon_learning_rate=0.01,
    )
    c.sampling.update(
        batch=128,
        decode_steps=8,
        prior_steps=25,
        eta=1.0,
        student_steps=4,
        student_self_conditioning="none",
        gamma=0.0,
    )
    c.evaluation.update(
        samples=256, decode_steps=(1, 2, 4, 8, 16, 32), control_steps=(2, 8), bound_draws=8
    )
    c.logging.update(
        metrics_every=50, validate_every=250, validation_batches=4, checkpoint_every=200, samples=2
    )


def _real_text(c: ConfigDict, corpus: str) -> None:
    if corpus == "pydocs":
        c.data.corpus = "pydocs"
    else:
        c.data.update(corpus="text_files", files=corpus)
    # The scorer trains on a quarter of the documents, which the model does not train on and is not
    # evaluated on.
    c.data.update(length=32, packing="packed", validation_fraction=0.05, scorer_fraction=0.25)
    c.tokenizer.update(kind="unigram", vocab_size=1024)
    c.features.with_embeddings = True
    c.backbone.update(width=96, num_layers=3, heads=4)
    c.encoder.update(num_latents=16, latent_dim=32, width=96, heads=4, num_layers=2)
    c.decoder.cross_layers = (0, 2)
    c.latent_denoiser.update(
        width=128, num_layers=3, heads=4, mlp_ratio=2.75, max_frequency=8.0, max_period=10.0
    )
    c.scorer_network.update(width=128, num_layers=3, heads=4, dropout=0.1)
    c.diffusion.d = 1.0
    for stage in (
        c.mdlm,
        c.mdlm_long,
        c.autoregressive,
        c.autoencoder,
        c.ladiff,
        c.diladiff,
        c.scorer,
    ):
        stage.batch = 64
    c.mdlm.steps, c.autoencoder.steps, c.ladiff.steps, c.diladiff.steps = 1200, 800, 2000, 200
    c.scorer.steps = 600
    # With weaker masking (0.2), one step decodes nine tenths of the text correctly, but from a
    # latent that the prior finds harder to learn.
    c.autoencoder.update(noise=0.3, p_feat=0.3, p_lat=0.4, p_drop=0.5)
    c.diladiff.update(
        learning_rate=3e-4,  # at 1e-3 the error grows once the tangents have their full weight
        muon_learning_rate=0.002,
        tangent_warmup=60,
        # So that it trains on t = 1 and r = 0, where sampling starts and ends.
        p_noise=0.2,
        p_clean=0.3,
    )
    c.sampling.update(batch=64, decode_steps=8, prior_steps=50, student_steps=5)
    c.evaluation.update(
        samples=256, decode_steps=(1, 2, 4, 8, 16, 32), control_steps=(2, 8), bound_draws=8
    )
    c.logging.update(
        metrics_every=50, validate_every=500, validation_batches=4, checkpoint_every=200, samples=2
    )
