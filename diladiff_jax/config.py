"""The schema of an experiment: every setting with its default, checks before any array is made, and messages.

The defaults are the paper's published setting (METHOD section 7). An experiment file in `configs/` starts from
`default_config()` and changes what differs; whatever a file, a command line or a workdir gives is passed
through `resolve`, which refuses unknown keys, wrong types and impossible combinations in one line each.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

STAGES = ("mdlm", "autoencoder", "ladiff", "diladiff")
"""The method, in the order of training."""

BASELINES = ("mdlm_long", "scorer")
"""Trained beside it where their `steps` is above 0: the budget control, which trains the MDLM on for as many steps as the
autoencoder stage trains its decoder, and the autoregressive scorer."""

PREDECESSOR = {
    "mdlm": None,
    "autoencoder": "mdlm",
    "ladiff": "autoencoder",
    "diladiff": "ladiff",
    "mdlm_long": "mdlm",
    "scorer": None,
}


_MOST = {"width": 2**17, "layers": 1024, "length": 2**17, "vocabulary": 2**20, "batch": 2**20}
"""Far beyond what is in use anywhere: what is above is a slip of the hand, which would be traced or allocated for hours before it fails."""


class ConfigError(ValueError):
    """A setting that cannot be: one line with the key, the value and what would be valid."""


def _training(**changes: Any) -> ConfigDict:
    block = dict(
        steps=0,
        batch=512,  # examples per update, over all devices and microbatches
        accumulate=1,  # microbatches per update
        optimizer="adamw",  # or "muon": orthogonalized momentum for matrices, Adam for the rest
        learning_rate=3e-4,
        muon_learning_rate=0.02,
        b1=0.9,
        b2=0.98,
        epsilon=1e-6,
        weight_decay=1e-5,
        clip=1.0,  # global gradient norm; 0 turns it off
        schedule="cosine",  # after the warm-up: "constant", "linear" or "cosine" down to final_ratio
        final_ratio=0.0,
        warmup=1_000,
        ema=0.9999,  # 0 keeps no average; what follows then uses the parameters themselves
    )
    return ConfigDict(block | changes)


def default_config() -> ConfigDict:
    """The published setting on OpenWebText, with the pretrained denoiser's own features."""
    c = ConfigDict()
    c.seed = 0
    c.compute_dtype = "float32"  # or "bfloat16"; optimizer and student stay in float32, and so do parameters (but for memory.param_dtype)

    c.data = ConfigDict(
        dict(
            corpus="openwebtext",  # "stories", "pydocs", "text_files", or a TFDS name
            files="",  # text_files: a file, folder or glob
            validation_files="",  # text_files: held-out files; else a share of the documents
            field="text",
            documents=50_000,  # stories: training documents to draw
            validation_documents=2_000,  # stories
            scorer_documents=0,  # stories
            validation_fraction=0.01,  # of the documents, chosen by a hash of their text
            validation_last=0,  # above 0: so many documents at the end of the corpus are held out, and no fraction
            scorer_fraction=0.0,  # held out from everything else to train the scorer
            max_documents=0,  # 0: all
            length=1024,
            packing="packed",  # or "document": one document a row, the rest filled with end-of-text
            directory="",  # where prepared text lives; "" is WORKDIR/data
            seed=0,
        )
    )
    c.tokenizer = ConfigDict(
        dict(
            kind="unigram",  # or "bpe" (both trained on the corpus), "wordpiece", "byte_bpe", "sentencepiece" (from a file)
            vocab_size=30_522,
            whole_words=0,  # trained kinds: so many frequent words are pieces of their own
            file="",
            lowercase=False,
        )
    )
    c.features = ConfigDict(
        dict(
            source="denoiser",  # the trained MDLM's last hidden states; or "bert": a published encoder's
            with_embeddings=False,  # denoiser: its token embeddings beside them
            path="",  # bert: a folder with config.json, vocab.txt and model.safetensors, or a hub name
            compute_dtype="bfloat16",  # bert: or "float32"
        )
    )
    c.backbone = ConfigDict(
        dict(
            width=768,
            num_layers=12,
            heads=12,
            mlp_ratio=4.0,
            positions="learned",
            norm="rmsnorm",
            qk_norm=True,
            adaln=0,
            embedding_std=0.02,  # of token embeddings and positions at the start
            tied_head=False,
            zero_head=False,
            dropout=0.0,
        )
    )
    c.encoder = ConfigDict(
        dict(num_latents=512, latent_dim=768, width=768, heads=12, num_layers=2, dropout=0.1)
    )
    c.decoder = ConfigDict(dict(cross_layers=(0, 11)))
    c.latent_denoiser = ConfigDict(
        dict(
            width=768,
            num_layers=12,
            heads=12,
            mlp_ratio=4.0,
            max_frequency=1.0,
            max_period=10.0,
            learned_positions=False,
        )
    )
    c.scorer_network = ConfigDict(dict(width=768, num_layers=12, heads=12, dropout=0.0))
    c.diffusion = ConfigDict(
        dict(
            schedule="tangent",  # or "linear_variance", "empirical"
            d=10.0,  # tangent
            k=4.0,  # empirical: slope and midpoint of the decoding error, fitted to the autoencoder
            t0=0.5,
        )
    )

    c.mdlm = _training(steps=1_000_000, weighting="one")
    c.mdlm_long = _training(weighting="one")
    c.autoencoder = _training(
        steps=200_000,
        learning_rate=5e-5,
        clip=10.0,
        ema=0.0,
        warmup=1_000,
        decoder_warmup=10_000,  # longer, so that the encoder learns first
        weighting="one",
        noise=0.5,  # s
        p_feat=0.7,
        p_lat=0.7,
        p_drop=0.75,
        statistics_decay=0.99,
    )
    c.ladiff = _training(
        steps=150_000, learning_rate=2e-4, schedule="constant", self_conditioning=0.5
    )
    c.diladiff = _training(
        steps=25_000,
        batch=2048,
        learning_rate=5e-5,
        schedule="constant",
        step_form="velocity",  # or "rotation": start from the teacher's DDIM step
        teacher_noise="implied",  # or "drawn"
        time_mean=-1.0,
        time_std=1.0,
        p_equal=0.25,
        p_noise=0.0,
        p_clean=0.0,
        self_conditioning=0.5,
        tangent_warmup=10_000,
        loss_offset=5.0,
    )
    c.scorer = _training()

    c.sampling = ConfigDict(
        dict(
            batch=32,
            temperature=1.0,
            top_p=0.9,
            decode_steps=64,
            order="random",  # which positions a step unmasks; or "count", "confidence", "threshold" (sampling.pipeline.ORDERS)
            threshold=0.9,  # "threshold": how sure is sure enough
            refresh_every=1,  # above 1: keys and values of all positions are made anew only so often, else of what was unmasked (orders "random", "count")
            skip_layers=(),  # layers of the backbone (never the last) that late steps are made without
            skip_from=0.5,  # late: from this part of all steps on
            prior_steps=200,
            prior_method="euler",  # or "ddim", "heun", "dpmpp_2m"
            prior_self_conditioning="previous",  # or "current", "none"
            student_steps=5,
            gamma=0.8,
            gamma_warp="noise_level",  # or "literal"
        )
    )
    c.evaluation = ConfigDict(
        dict(
            samples=1024,
            decode_steps=(8, 16, 32, 64, 128, 256, 512, 1024),
            control_steps=(8, 64, 512),
            bound_draws=128,
            seed=1,
            scorer="",  # generative perplexity: "" by the trained scorer stage, if any; or a folder or hub name of a GPT-2
        )
    )
    c.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))  # -1: all devices that are left
    c.memory = ConfigDict(
        dict(
            scan=False,  # one compiled layer for all alike, of every deep network: compiles in constant time
            remat="none",  # what blocks keep for the gradient: "none" keeps all, "matmuls" the linear maps' results, "full" nothing
            param_dtype="float32",  # or "bfloat16": matrices are kept so, rounded stochastically; average and optimizer stay in float32
            loss_positions=128,  # of each row, projected to the vocabulary at a time
        )
    )
    c.logging = ConfigDict(
        dict(
            metrics_every=100,
            validate_every=5_000,
            validation_batches=8,
            checkpoint_every=5_000,
            keep_checkpoints=2,
            samples=2,
            max_skips=10,  # updates in a row that may be skipped because loss or gradient is not finite; one more ends the training
            profile_at=10,
            profile_steps=0,  # a trace of so many updates from that one on, in STAGE/profile; 0: none
        )
    )
    return c


def resolve(given: Mapping[str, Any] | ConfigDict) -> ConfigDict:
    """Lays `given` over the defaults and checks the whole.

    Raises:
      ConfigError: unknown key, wrong type, or a combination that cannot be.
    """
    config = default_config()
    _overlay(config, given.to_dict() if isinstance(given, ConfigDict) else given, "")
    check(config)
    config.lock()
    return config


def _overlay(target: ConfigDict, given: Mapping[str, Any], prefix: str) -> None:
    for key, value in given.items():
        name = f"{prefix}{key}"
        if not isinstance(key, str):
            raise ConfigError(f"config key {name} is of type {type(key).__name__}; names are text")
        if key not in target:
            near = difflib.get_close_matches(key, list(target), n=1)
            hint = (
                f"; did you mean {prefix}{near[0]}?"
                if near
                else f"; known here: {', '.join(target)}"
            )
            raise ConfigError(f"config key {name} is unknown{hint}")
        if isinstance(target[key], ConfigDict):
            if not isinstance(value, Mapping):
                raise ConfigError(f"config key {name} is {value!r}; it must be a block of settings")
            _overlay(target[key], value, name + ".")
        else:
            target[key] = _convert(name, value, target[key])


def _convert(name: str, value: Any, default: Any) -> Any:
    kind = type(default)
    if kind is tuple and isinstance(value, list | tuple):
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            raise ConfigError(
                f"config key {name} is {value!r}; it must be a sequence of whole numbers"
            )
        return tuple(value)
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**128 else math.inf
    if kind is int and type(value) is int and not name.endswith("seed") and abs(value) >= 2**31:
        raise ConfigError(f"config key {name} is {value!r}; it must be a whole number of 32 bits")
    if kind is float and type(value) is float and not abs(value) < 2.0**128:
        raise ConfigError(f"config key {name} is {value!r}; it must be a finite number of 32 bits")
    if kind is not type(value):
        words = {
            int: "a whole number",
            float: "a number",
            str: "text",
            bool: "true or false",
            tuple: "a sequence of whole numbers",
        }
        raise ConfigError(f"config key {name} is {value!r}; it must be {words[kind]}")
    return value


def check(config: ConfigDict) -> None:
    """Refuses impossible values and combinations.

    Raises:
      ConfigError: with the key, its value, and what would be valid.
    """

    def need(ok: bool, key: str, valid: str) -> None:
        if not ok:
            value: Any = config
            for part in key.split("."):
                value = value[part]
            raise ConfigError(f"config key {key} is {value!r}; it must be {valid}")

    def one_of(key: str, *values: str) -> None:
        block, _, leaf = key.rpartition(".")
        need(
            (config[block] if block else config)[leaf] in values, key, "one of " + ", ".join(values)
        )

    need(-(2**63) <= config.seed < 2**63, "seed", "a whole number of 64 bits")
    one_of("compute_dtype", "float32", "bfloat16")
    d = config.data
    need(2 <= d.length <= _MOST["length"], "data.length", f"between 2 and {_MOST['length']}")
    one_of("data.packing", "packed", "document")
    need(0 < d.validation_fraction < 1, "data.validation_fraction", "between 0 and 1")
    need(
        0 <= d.scorer_fraction < 1 - d.validation_fraction,
        "data.scorer_fraction",
        "between 0 and 1 - data.validation_fraction",
    )
    need(
        d.corpus != "text_files" or bool(d.files),
        "data.files",
        "a file, folder or glob when data.corpus is text_files",
    )
    need(
        d.documents > 0 and d.validation_documents > 0,
        "data.documents",
        "above 0, as data.validation_documents",
    )
    need(d.max_documents >= 0, "data.max_documents", "0 (all) or more")
    need(d.validation_last >= 0, "data.validation_last", "0 (a fraction instead) or more")
    one_of("tokenizer.kind", "unigram", "bpe", "wordpiece", "byte_bpe", "sentencepiece")
    from_file = config.tokenizer.kind in ("wordpiece", "byte_bpe", "sentencepiece")
    need(
        bool(config.tokenizer.file) or not from_file,
        "tokenizer.file",
        f"a vocabulary file when tokenizer.kind is {config.tokenizer.kind}",
    )
    need(
        0 < config.tokenizer.vocab_size <= _MOST["vocabulary"],
        "tokenizer.vocab_size",
        f"between 1 and {_MOST['vocabulary']}",
    )
    need(config.tokenizer.whole_words >= 0, "tokenizer.whole_words", "0 or more")
    one_of("features.source", "denoiser", "bert")
    one_of("features.compute_dtype", "bfloat16", "float32")
    if config.features.source == "bert":
        need(
            bool(config.features.path),
            "features.path",
            "an encoder's folder or hub name when features.source is bert",
        )
        need(
            not config.features.with_embeddings,
            "features.with_embeddings",
            "false when features.source is bert: only the denoiser's can be added",
        )
        need(
            config.tokenizer.kind == "wordpiece",
            "tokenizer.kind",
            "wordpiece when features.source is bert: the encoder reads its own ids",
        )

    for name in ("backbone", "encoder", "latent_denoiser", "scorer_network"):
        block = config[name]
        need(0 < block.width <= _MOST["width"], f"{name}.width", f"between 1 and {_MOST['width']}")
        need(
            0 < block.num_layers <= _MOST["layers"],
            f"{name}.num_layers",
            f"between 1 and {_MOST['layers']}",
        )
        need(
            block.heads > 0 and block.width % block.heads == 0,
            f"{name}.heads",
            f"a divisor of {name}.width = {block.width}",
        )
    rotary_blocks = ["latent_denoiser"] + (
        ["backbone", "scorer_network"] if config.backbone.positions == "rotary" else []
    )
    for name in rotary_blocks:
        need(
            config[name].width // config[name].heads % 2 == 0,
            f"{name}.heads",
            f"such that {name}.width / heads is even (rotary positions)",
        )
    one_of("backbone.positions", "learned", "rotary")
    one_of("backbone.norm", "rmsnorm", "layernorm")
    for name in ("backbone", "encoder", "scorer_network"):
        need(0 <= config[name].dropout < 1, f"{name}.dropout", "in [0, 1)")
    for name in ("backbone", "latent_denoiser"):
        need(
            1 <= config[name].mlp_ratio * config[name].width <= 8 * _MOST["width"],
            f"{name}.mlp_ratio",
            f"such that {name}.width times it is between 1 and {8 * _MOST['width']}",
        )
    need(config.backbone.embedding_std > 0, "backbone.embedding_std", "above 0")
    need(
        0 <= config.backbone.adaln <= _MOST["width"],
        "backbone.adaln",
        f"0 (none) or the width of the condition, at most {_MOST['width']}",
    )
    need(
        1 <= config.encoder.num_latents <= d.length,
        "encoder.num_latents",
        f"between 1 and data.length = {d.length}",
    )
    need(
        0 < config.encoder.latent_dim <= _MOST["width"],
        "encoder.latent_dim",
        f"between 1 and {_MOST['width']}",
    )
    layers, depth = config.decoder.cross_layers, config.backbone.num_layers
    need(
        len(layers) > 0 and all(0 <= i < depth for i in layers),
        "decoder.cross_layers",
        f"layer indices from 0 to {depth - 1}",
    )
    one_of("diffusion.schedule", "tangent", "linear_variance", "empirical")
    need(config.diffusion.d > 0, "diffusion.d", "above 0")
    t0 = config.diffusion.t0
    need(0 < t0 < 1, "diffusion.t0", "between 0 and 1")
    need(
        0 < config.diffusion.k <= 4 / max(t0, 1 - t0),
        "diffusion.k",
        f"above 0 and at most {4 / max(t0, 1 - t0):.3g} at diffusion.t0 = {t0} (steeper needs steps without number)",
    )

    for stage in STAGES + BASELINES:
        _check_training(config, stage, need, one_of)
    for stage in ("mdlm", "mdlm_long", "autoencoder"):
        one_of(f"{stage}.weighting", "one", "bound")
    for key in ("p_feat", "p_lat", "p_drop"):
        need(0 <= config.autoencoder[key] <= 1, f"autoencoder.{key}", "between 0 and 1")
    need(0 <= config.autoencoder.noise < 1, "autoencoder.noise", "in [0, 1)")
    need(0 < config.autoencoder.statistics_decay <= 1, "autoencoder.statistics_decay", "in (0, 1]")
    need(config.autoencoder.decoder_warmup >= 0, "autoencoder.decoder_warmup", "0 or more")
    need(0 <= config.ladiff.self_conditioning <= 1, "ladiff.self_conditioning", "between 0 and 1")
    one_of("diladiff.step_form", "velocity", "rotation")
    one_of("diladiff.teacher_noise", "implied", "drawn")
    for key in ("p_equal", "p_noise", "p_clean", "self_conditioning"):
        need(0 <= config.diladiff[key] <= 1, f"diladiff.{key}", "between 0 and 1")
    if (
        config.diffusion.schedule == "linear_variance"
    ):  # the derivative of its angle is infinite at both ends
        need(
            config.diladiff.p_noise == 0,
            "diladiff.p_noise",
            "0 when diffusion.schedule is linear_variance",
        )
        need(
            config.diladiff.p_clean == 0,
            "diladiff.p_clean",
            "0 when diffusion.schedule is linear_variance",
        )
        need(
            config.diladiff.step_form == "rotation",
            "diladiff.step_form",
            "rotation when diffusion.schedule is linear_variance, whose velocity is infinite at t = 1",
        )
        need(
            config.sampling.prior_method in ("ddim", "dpmpp_2m"),
            "sampling.prior_method",
            "ddim or dpmpp_2m when diffusion.schedule is linear_variance, whose velocity is infinite at t = 1",
        )
    need(config.diladiff.time_std > 0, "diladiff.time_std", "above 0")
    need(config.diladiff.loss_offset > 0, "diladiff.loss_offset", "above 0")
    need(config.diladiff.tangent_warmup >= 0, "diladiff.tangent_warmup", "0 or more")
    held_out = d.scorer_documents if d.corpus == "stories" else d.scorer_fraction
    key = "data.scorer_documents" if d.corpus == "stories" else "data.scorer_fraction"
    need(
        config.scorer.steps == 0 or held_out > 0,
        key,
        "above 0 when scorer.steps is: the scorer needs text of its own",
    )

    s = config.sampling
    need(s.batch > 0, "sampling.batch", "above 0")
    need(s.temperature >= 0, "sampling.temperature", "0 or more")
    need(0 <= s.top_p <= 1, "sampling.top_p", "between 0 and 1")
    for key in ("decode_steps", "prior_steps", "student_steps"):
        need(s[key] > 0, f"sampling.{key}", "above 0")
    one_of("sampling.order", "random", "count", "confidence", "threshold")
    need(0 <= s.threshold <= 1, "sampling.threshold", "between 0 and 1")
    need(s.refresh_every > 0, "sampling.refresh_every", "above 0")
    need(
        s.refresh_every == 1 or s.order in ("random", "count"),
        "sampling.refresh_every",
        f"1 when sampling.order is {s.order}, which looks at all masked positions in every step",
    )
    need(
        all(0 <= i < depth - 1 for i in s.skip_layers),
        "sampling.skip_layers",
        f"layer indices from 0 to {depth - 2}: the last one makes the logits"
        if depth > 1
        else "empty: the only layer makes the logits",
    )
    need(
        not s.skip_layers or s.refresh_every == 1,
        "sampling.skip_layers",
        "empty when sampling.refresh_every is above 1: all layers' keys and values are kept",
    )
    need(
        not s.skip_layers or s.order != "threshold",
        "sampling.skip_layers",
        "empty when sampling.order is threshold, whose number of steps is not known before",
    )
    need(0 <= s.skip_from <= 1, "sampling.skip_from", "between 0 and 1")
    one_of("sampling.prior_method", "euler", "ddim", "heun", "dpmpp_2m")
    one_of("sampling.prior_self_conditioning", "previous", "current", "none")
    need(0 <= s.gamma < 1, "sampling.gamma", "in [0, 1)")
    one_of("sampling.gamma_warp", "noise_level", "literal")
    e = config.evaluation
    need(0 <= e.seed < 2**31, "evaluation.seed", "from 0 to 2147483647")
    need(e.samples > 0, "evaluation.samples", "above 0")
    need(e.bound_draws > 0, "evaluation.bound_draws", "above 0")
    for key in ("decode_steps", "control_steps"):
        need(
            len(e[key]) > 0 and min(e[key]) > 0,
            f"evaluation.{key}",
            "a sequence of numbers above 0",
        )
    for axis in ("data", "fsdp", "tensor"):
        need(
            config.mesh[axis] > 0 or config.mesh[axis] == -1,
            f"mesh.{axis}",
            "above 0, or -1 for all devices that are left",
        )
    need(
        list(config.mesh.values()).count(-1) <= 1,
        "mesh.data",
        "given when another axis is -1: only one can take what is left",
    )
    one_of("memory.param_dtype", "float32", "bfloat16")
    one_of("memory.remat", "none", "matmuls", "full")
    need(config.memory.loss_positions > 0, "memory.loss_positions", "above 0")
    for key in (
        "metrics_every",
        "validate_every",
        "validation_batches",
        "checkpoint_every",
        "keep_checkpoints",
    ):
        need(config.logging[key] > 0, f"logging.{key}", "above 0")
    for key in ("samples", "max_skips", "profile_at", "profile_steps"):
        need(config.logging[key] >= 0, f"logging.{key}", "0 or more")


def _check_training(config: ConfigDict, stage: str, need: Any, one_of: Any) -> None:
    c = config[stage]
    need(c.steps >= 0, f"{stage}.steps", "0 or more")
    need(0 < c.batch <= _MOST["batch"], f"{stage}.batch", f"between 1 and {_MOST['batch']}")
    need(
        c.accumulate > 0 and c.batch % c.accumulate == 0,
        f"{stage}.accumulate",
        f"a divisor of {stage}.batch = {c.batch}",
    )
    one_of(f"{stage}.optimizer", "adamw", "muon")
    one_of(f"{stage}.schedule", "constant", "linear", "cosine")
    for key in ("learning_rate", "muon_learning_rate", "epsilon"):
        need(c[key] > 0, f"{stage}.{key}", "above 0")
    for key in ("b1", "b2", "ema"):
        need(0 <= c[key] < 1, f"{stage}.{key}", "in [0, 1)")
    need(0 <= c.final_ratio <= 1, f"{stage}.final_ratio", "between 0 and 1")
    for key in ("weight_decay", "clip", "warmup"):
        need(c[key] >= 0, f"{stage}.{key}", "0 or more")


def stages_of(config: ConfigDict) -> tuple[str, ...]:
    """The stages that `--stage=all` trains, in order: the method, then the baselines that have steps."""
    return tuple(s for s in STAGES + BASELINES if config[s].steps > 0)
