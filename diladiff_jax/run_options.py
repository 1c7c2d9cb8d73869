"""Settings of a run: optimizer, mesh, memory, logging, evaluation. None changes what a model is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from diladiff_jax.options import (
    Options,
    Rule,
    above,
    at_least,
    between,
    fraction_below,
    one_of,
    setting,
)

MAX_BATCH = 2**20
"""Sanity limit: a larger batch is almost certainly a typo, and would allocate for hours."""

_POSITIVE_INTEGERS = Rule(
    lambda values: len(values) > 0 and min(values) > 0, "a non-empty sequence of numbers above 0"
)
_MESH_SIZE = Rule(lambda size: size > 0 or size == -1, "above 0, or -1 for all remaining devices")


@dataclasses.dataclass(frozen=True)
class ExperimentOptions(Options):
    """Settings of the experiment as a whole."""

    seed: int = setting(
        0,
        "of initialization, training and data order",
        Rule(lambda value: -(2**63) <= value < 2**63, "a whole number of 64 bits"),
    )
    compute_dtype: str = setting(
        "float32",
        "of activations; the optimizer, the student's training and (unless memory.param_dtype "
        "differs) parameters are in float32; may change between commands",
        one_of("float32", "bfloat16"),
    )


@dataclasses.dataclass(frozen=True)
class TrainingOptions(Options):
    """How a stage is trained. Every stage has these in addition to its objective's options."""

    steps: int = setting(0, "updates; 0 leaves the stage out", at_least(0))
    batch: int = setting(
        512, "examples per update, over all devices and microbatches", between(1, MAX_BATCH)
    )
    accumulate: int = setting(1, "microbatches per update", above(0))
    optimizer: str = setting(
        "adamw",
        "adamw, or muon: orthogonalized momentum for matrices and Adam for the rest",
        one_of("adamw", "muon"),
    )
    learning_rate: float = setting(3e-4, "peak learning rate of Adam", above(0))
    muon_learning_rate: float = setting(0.02, "peak learning rate of Muon", above(0))
    b1: float = setting(0.9, "decay of Adam's first moment", fraction_below(1))
    b2: float = setting(0.98, "decay of Adam's second moment", fraction_below(1))
    epsilon: float = setting(1e-6, "of Adam's denominator", above(0))
    weight_decay: float = setting(1e-5, "of matrices", at_least(0))
    clip: float = setting(1.0, "global gradient norm to clip at; 0 turns it off", at_least(0))
    schedule: str = setting(
        "cosine", "decay after the warm-up", one_of("constant", "linear", "cosine")
    )
    final_ratio: float = setting(0.0, "last learning rate over the peak", between(0, 1))
    warmup: int = setting(1_000, "warm-up steps", at_least(0))
    ema: float = setting(
        0.9999,
        "decay of the parameters' average; 0 keeps none, and what follows uses the parameters",
        fraction_below(1),
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Microbatches are of equal size."""
        if self.batch % self.accumulate:
            yield "accumulate", f"a divisor of batch = {self.batch}"


@dataclasses.dataclass(frozen=True)
class MeshOptions(Options):
    """Sizes of the device mesh; one may be -1 and takes all remaining devices."""

    data: int = setting(
        -1, "replicas of the parameters; each takes a part of the batch", _MESH_SIZE
    )
    fsdp: int = setting(1, "devices that share the batch and shard the parameters", _MESH_SIZE)
    tensor: int = setting(1, "devices that shard heads, MLP and vocabulary", _MESH_SIZE)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Only one axis can take what remains."""
        if [self.data, self.fsdp, self.tensor].count(-1) > 1:
            yield "data", "a size above 0, since only one axis can take all remaining devices"


@dataclasses.dataclass(frozen=True)
class MemoryOptions(Options):
    """What is traded for memory or compile time."""

    scan: bool = setting(
        False, "scan over the layers of deep networks: compile time does not grow with depth"
    )
    remat: str = setting(
        "none",
        "what blocks keep for the gradient: none keeps everything, matmuls the results of linear "
        "maps, full nothing",
        one_of("none", "matmuls", "full"),
    )
    param_dtype: str = setting(
        "float32",
        "of matrices; bfloat16 rounds updates stochastically, average and optimizer stay in "
        "float32",
        one_of("float32", "bfloat16"),
    )
    loss_positions: int = setting(
        128, "positions of each row that are projected to the vocabulary at once", above(0)
    )
    latent_cache_gib: float = setting(
        8.0,
        "disk for latents that stages with a frozen encoder compute once for all rows; if they "
        "take more, every update encodes its rows",
        at_least(0),
    )


@dataclasses.dataclass(frozen=True)
class LoggingOptions(Options):
    """What a run logs, validates and saves, and how often, in updates."""

    metrics_every: int = setting(100, "updates between metrics", above(0))
    validate_every: int = setting(5_000, "updates between validations", above(0))
    validation_batches: int = setting(8, "batches of a validation", above(0))
    checkpoint_every: int = setting(5_000, "updates between checkpoints", above(0))
    keep_checkpoints: int = setting(2, "checkpoints kept per stage", above(0))
    samples: int = setting(2, "texts printed at each validation", at_least(0))
    max_skips: int = setting(
        10,
        "consecutive updates that may be skipped because loss or gradient is not finite; one more "
        "stops the training",
        at_least(0),
    )
    profile_at: int = setting(10, "update at which the trace starts", at_least(0))
    profile_steps: int = setting(0, "updates of the trace in STAGE/profile; 0: none", at_least(0))


@dataclasses.dataclass(frozen=True)
class EvaluationOptions(Options):
    """The sweep of `launch/evaluate.py`."""

    samples: int = setting(1024, "texts per model and number of steps", above(0))
    decode_steps: tuple[int, ...] = setting(
        (8, 16, 32, 64, 128, 256, 512, 1024), "numbers of steps of the models", _POSITIVE_INTEGERS
    )
    control_steps: tuple[int, ...] = setting(
        (8, 64, 512), "numbers of steps of the controls", _POSITIVE_INTEGERS
    )
    bound_draws: int = setting(128, "Monte Carlo samples of the bound per row", above(0))
    seed: int = setting(
        1, "of the samples", Rule(lambda value: 0 <= value < 2**31, "from 0 to 2147483647")
    )
    scorer: str = setting(
        "",
        "model that measures generative perplexity: `smollm2` (after `launch/install_smollm2.sh`), "
        "a GGUF file, or a folder or hub name of a GPT-2 or Llama; empty takes the stage `scorer`, "
        "if trained",
    )
