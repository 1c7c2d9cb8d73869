"""Programs of an experiment compiled ahead of time, for devices that need not be there: shapes only, no array is ever made.

No workdir, no data, no tokenizer and no published weights are read. What stands in for them has their shapes: a vocabulary of the
config's size, and bert-base's architecture where `features.path` is not a folder here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diladiff_jax import config as config_lib
from diladiff_jax import files
from diladiff_jax.experiment import Experiment
from diladiff_jax.nn import bert
from diladiff_jax.parallel import sharding
from diladiff_jax.preflight import hlo, hlo_costs, roofline
from diladiff_jax.sampling.pipeline import MODELS, Controls
from diladiff_jax.storage import pretrained
from diladiff_jax.training.flops import model_flops
from diladiff_jax.training.optimizer import make_optimizer
from diladiff_jax.training.state import compile_steps, init_state, state_shardings

BERT_BASE = dict(
    model_type="bert",
    hidden_act="gelu",
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    max_position_embeddings=512,
    type_vocab_size=2,
)
"""The architecture of bert-base (arXiv 1810.04805), but for its vocabulary."""

_MULTIPLE = 128  # what tokenizers fill their vocabularies up to
_SPECIALS_ADDED = {"unigram": 0, "bpe": 0, "wordpiece": 0, "byte_bpe": 2, "sentencepiece": 1}
"""By tokenizer kind, beside `tokenizer.vocab_size`: a trained vocabulary counts them, BERT's has them, GPT-2's lacks pad and mask, most others the mask."""


class CompileError(RuntimeError):
    """A program that cannot be compiled for other reasons than its memory: one line."""


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """What networks and objectives need of a tokenizer: how many ids, and which of them are special."""

    vocab_size: int
    mask_id: int
    eot_id: int
    sampleable: np.ndarray

    @classmethod
    def of(cls, settings: ConfigDict) -> Vocabulary:
        """A vocabulary of the size that the tokenizer of these settings has, filled up as tokenizers fill theirs up."""
        pieces = settings.vocab_size + _SPECIALS_ADDED[settings.kind]
        size = -(-pieces // _MULTIPLE) * _MULTIPLE
        sampleable = np.arange(size) < pieces - 2
        return cls(size, pieces - 1, pieces - 3, sampleable)


class AbstractExperiment(Experiment):
    """An experiment of which nothing is there but its config and a mesh: what it restores are shapes with their shardings."""

    def __init__(self, config: ConfigDict, mesh: Mesh) -> None:
        super().__init__(config, pathlib.Path("unused"), Vocabulary.of(config.tokenizer), mesh)  # type: ignore[arg-type]

    def restore(self, stage: str) -> Any:
        """Shapes of the parameters that `Experiment.restore` gives."""
        if stage == "bert":
            boxed = bert.abstract_parameters(self.networks.bert)
        else:
            boxed = jax.eval_shape(self.objective(stage).init, _abstract_key())
        return abstract(nn.unbox(boxed), sharding.parameter_shardings(boxed, self.mesh))

    def restore_statistics(self) -> dict[str, Any]:
        """Shapes of the frozen statistics."""
        shapes = jax.eval_shape(self.objective("autoencoder").init_statistics)  # type: ignore[attr-defined]
        return abstract(shapes, jax.tree.map(lambda _: sharding.replicated(self.mesh), shapes))

    def _published_encoder(self) -> bert.Bert | None:
        if self.config.features.source != "bert":
            return None
        folder, dtype = (
            files.expand(self.config.features.path),
            jnp.dtype(self.config.features.compute_dtype),
        )
        found = (
            pretrained.read_config(folder)
            if (folder / "config.json").is_file()
            else BERT_BASE | {"vocab_size": self.config.tokenizer.vocab_size}
        )
        # Which ids begin and end a text is no matter of shapes.
        return bert.from_config(found, pieces=found["vocab_size"], cls_id=0, sep_id=1, dtype=dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What is compiled.

    Attributes:
      lower: traces it and gives what `compile` reads.
      parameters: shapes with shardings of all parameters that it is given.
      batch: examples at a time, over all devices.
      flops: model FLOPs of one call over all devices; None where what the program counts is taken.
      unknown_trips: see `hlo_costs.costs`.
    """

    lower: Callable[[], jax.stages.Lowered]
    parameters: Any
    batch: int
    flops: float | None = None
    unknown_trips: tuple[float, ...] = ()


def train_step(experiment: Experiment, stage: str) -> Program:
    """The update of a stage as the train loop compiles it.

    Raises:
      ConfigError: a batch that the devices do not divide.
    """
    settings, mesh, config = experiment.config[stage], experiment.mesh, experiment.config
    objective = experiment.objective(stage)
    parts = sharding.batch_devices(mesh) * settings.accumulate
    if settings.batch % parts:
        raise config_lib.ConfigError(
            f"config key {stage}.batch is {settings.batch}; it must be a multiple of data x fsdp devices x accumulate = {parts}"
        )
    tx = make_optimizer(settings, objective.group)
    dtype = jnp.dtype(config.memory.param_dtype)
    boxed = jax.eval_shape(
        lambda key: init_state(objective, tx, key, ema=settings.ema > 0, dtype=dtype),
        _abstract_key(),
    )
    shardings = nn.unbox(state_shardings(boxed, mesh))
    state = abstract(nn.unbox(boxed), shardings)
    context = experiment.context(stage)
    context = context.replace(
        frozen={name: tree for name, tree in context.frozen.items() if name != "start"}
    )  # as the loop does
    tokens = jax.ShapeDtypeStruct(
        (settings.batch, config.data.length), jnp.int32, sharding=sharding.batch_sharding(mesh)
    )
    update, _ = compile_steps(
        objective, tx, shardings, context, mesh, ema=settings.ema, accumulate=settings.accumulate
    )

    # Traced on one row and scaled: no product of a step runs over examples.
    row = jax.ShapeDtypeStruct((1, config.data.length), jnp.int32)

    def loss(params: Any, frozen: Any, statistics: Any, tokens: Any, key: Any, step: Any) -> Any:
        return objective.loss(
            params, context.replace(frozen=frozen, statistics=statistics), tokens, key, step
        )[0]

    statistics = state.statistics or context.statistics
    step = jax.ShapeDtypeStruct((), jnp.int32)
    flops = settings.batch * model_flops(
        loss, state.params, context.frozen, statistics, row, _abstract_key(), step
    )
    return Program(
        lambda: update.lower(state, context, tokens),
        (state.params, context.frozen),
        settings.batch,
        flops,
    )


def sampler(experiment: Experiment, model: str) -> Program:
    """A model's whole sampler as `Model.compiled` builds it, at the config's batch and numbers of steps.

    The steps of the latent's sampler are made a constant of the program, so that its loop can be counted. The decoding loop
    cannot: it runs once for each step in which a position is unmasked, and works on so many positions at a time as the row with
    the most of them needs rounds.

    Raises:
      ConfigError: no such model.
    """
    if model not in MODELS:
        raise config_lib.ConfigError(f"sampler is {model!r}; it must be one of {', '.join(MODELS)}")
    settings, mesh = experiment.config.sampling, experiment.mesh
    devices, length = sharding.batch_devices(mesh), experiment.config.data.length
    size = -(-settings.batch // devices) * devices
    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    if model in ("mdlm", "mdlm_long"):
        params = {"denoiser": experiment.restore("mdlm")}
    else:
        network = "teacher" if model == "ladiff" else "student"
        params = {
            "decoder": experiment.restore("autoencoder")["decoder"],
            network: experiment.restore(model),
        }
    steps = settings.prior_steps if model == "ladiff" else settings.student_steps
    run, kinds = (
        experiment.sampler(),
        dict(
            decode_steps=jnp.int32,
            temperature=jnp.float32,
            top_p=jnp.float32,
            gamma=jnp.float32,
            threshold=jnp.float32,
        ),
    )
    scalars = {name: jax.ShapeDtypeStruct((), kind, sharding=whole) for name, kind in kinds.items()}

    def draw(params: Any, key: Any, indices: Any, prompt: Any, given: dict[str, Any]) -> Any:
        return run.generate(
            model, params, key, indices, prompt, Controls(latent_steps=steps, **given)
        )

    jitted = jax.jit(
        sharding.on_mesh(draw, mesh),
        in_shardings=(None, whole, split, split, whole),
        out_shardings=split,
    )
    indices = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=split)
    prompt = jax.ShapeDtypeStruct((size, length), jnp.int32, sharding=split)
    return Program(
        lambda: jitted.lower(params, _abstract_key(whole), indices, prompt, scalars),
        params,
        size,
        None,
        decoding_trips(size, length, settings.decode_steps, settings.order),
    )


def decoding_trips(
    batch: int, length: int, steps: int, order: str = "random", *, rows: int = 256, draws: int = 64
) -> tuple[float, float]:
    """How often the two loops of `sampling.tokens` run from a blank prompt: decoding steps, and rounds of `rows` positions in a step.

    Steps in which nothing is unmasked are left out. Order "random": means over drawn examples, the step of each position being uniform
    over all steps. By confidence every step draws for all that is masked; "threshold", whose steps depend on the text, is taken to
    need as many.
    """
    size = max(1, min(length, rows // batch))
    if order == "count":
        return float(min(steps, length)), float(-(-max(1, length // steps) // size))
    if order in ("confidence", "threshold"):
        left = length - length * np.arange(steps) // steps
        return float(steps), float(np.mean(-(-left // size)))
    rng = np.random.default_rng(0)
    busy, rounds = [], []
    for _ in range(max(1, draws // batch)):
        counts = rng.multinomial(length, np.full(steps, 1.0 / steps), size=batch)
        most = counts.max(axis=0)
        busy.append(np.count_nonzero(most))
        rounds.append(np.mean(-(-most[most > 0] // size)))
    return float(np.mean(busy)), float(np.mean(rounds))


def measure(program: Program, where: roofline.Slice, mesh: Mesh) -> dict[str, Any]:
    """Compiles, counts and estimates: the `fits` and `per_device` of the documented form, and what was counted beside it.

    Where the program does not fit, the compiler gives no program to count, so all but the parameters and the memory is None.

    Raises:
      CompileError: the compiler refuses for another reason than memory.
    """
    chip = where.chip
    capacity = chip.memory / chip.devices
    found: dict[str, Any] = {
        "parameter_bytes": parameter_bytes(program.parameters),
        "peak_bytes": None,
        "capacity_bytes": int(capacity),
    }
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = exhausted_bytes(str(error))
        if needed is None:
            raise CompileError(_first_line(str(error))) from None
        nothing = dict.fromkeys(
            (
                "flops",
                "bytes_accessed",
                "collectives",
                "estimated_seconds",
                "estimated_utilization",
                "bound_by",
            )
        )
        return {"fits": False, "per_device": found | {"peak_bytes": needed} | nothing}
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = max(
        held + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        getattr(memory, "peak_memory_in_bytes", 0),
    )
    counted = hlo_costs.costs(hlo.parse(compiled.as_text()), program.unknown_trips)
    sums = hlo_costs.totals(counted)
    coordinates = [tuple(device.coords[: len(where.sides)]) for device in mesh.devices.flat]
    bound = roofline.estimate(counted, where, coordinates)
    flops = sums.flops if program.flops is None else program.flops / mesh.size
    found |= {
        "peak_bytes": int(peak),
        "flops": sums.flops,
        "bytes_accessed": sums.bytes,
        "collectives": {
            kind: {"count": count, "bytes": size}
            for kind, (count, size) in sorted(sums.collectives.items())
        },
        "estimated_seconds": bound.seconds,
        "estimated_utilization": flops / (bound.seconds * chip.flops / chip.devices)
        if bound.seconds
        else 0.0,
        "bound_by": bound.bound_by,
        "argument_bytes": int(memory.argument_size_in_bytes),
        "temporary_bytes": int(memory.temp_size_in_bytes),
        "model_flops": flops,
        "elementwise_flops": sums.elementwise,
        "compute_seconds": bound.compute_seconds,
        "memory_seconds": bound.memory_seconds,
        "interconnect_seconds": bound.interconnect_seconds,
        "exposed_interconnect_seconds": bound.exposed_seconds,
        "uncounted_kernels": sums.unseen,
    }
    return {"fits": peak <= capacity, "per_device": found}


def parameter_bytes(tree: Any) -> int:
    """Bytes of a tree of shapes with shardings that lie on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def abstract(shapes: Any, shardings: Any) -> Any:
    """Shapes with where they lie, in place of arrays."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def exhausted_bytes(message: str) -> int | None:
    """Bytes that a program would need on a device, by the compiler's complaint; None if it complains of something else."""
    found = re.search(
        r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm|required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM",
        message,
    )
    if found is None:
        return None
    number, unit = (found.group(i) or found.group(i + 2) for i in (1, 2))
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))


def _abstract_key(placed: jax.sharding.Sharding | None = None) -> jax.ShapeDtypeStruct:
    key = jax.eval_shape(functools.partial(jax.random.key, 0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=placed)


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")[
        :300
    ]


def device_mesh(config: ConfigDict, devices: Sequence[Any]) -> Mesh:
    """The config's mesh over the given devices.

    Raises:
      ConfigError: its sizes do not fit them.
    """
    try:
        return sharding.make_mesh(config.mesh, list(devices))
    except ValueError as error:
        raise config_lib.ConfigError(str(error)) from None
