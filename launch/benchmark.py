"""Times the samplers on random weights, against a sampler without any of their savings; or the updates of every stage, piece by piece.

    python launch/benchmark.py --suite=sampling --size=tiny --out=bench.json
    python launch/benchmark.py --suite=training --size=tiny --batch=128 --out=bench.json
    python launch/benchmark.py --suite=sampling --size=small --batch=1,8,32 --decode_steps=64 --out=bench.json
    python launch/benchmark.py --suite=sampling --size=paper --batch=8 --decode_steps=64 --timed_steps=4 --rounds=3 --out=bench.json

Sampling: ways of decoding from the same latents, timed in turns in one run:
  naive             all logits in every step, the nucleus by a full sort, the latent read anew each time
  bisection         the same with the library's nucleus in place of the sort
  ours              what the library does: the positions of a step alone, the latent read once
  approx_skip       the same with sampling.skip_layers: the second half of the steps is made without every second layer (not the first, not the last)
  approx_refresh_R  as ours with sampling.refresh_every=R: keys and values of all positions are made anew every R steps
All attend in the library's own way, so that the ratios show the decoding and not the attention. In the same turns are timed, for all
positions and layers of the backbone in one step, the products alone: those of its linear maps (`linear_maps_seconds`) and the two of
attention, scores and mixture (`attention_products_seconds`); and the latents: of the student, and of the undistilled prior in
--prior_steps steps, of which --timed_steps are run. A way that needs more memory than the device has is left out, and said.

With --timed_steps=N below --decode_steps=T only N steps are run, on rows in which all but N/T of the tokens are given:
each step then unmasks as many as one of T does. Times are scaled by T/N, and the row says so (`timed_steps`).
Training: of every stage, its loss alone, its loss with the gradient, its optimizer alone, and the whole update, in turns;
`fraction_of_matmul_rate` counts the products that the model needs, not what a program does beside them; the prior's updates are all
self-conditioned here, as in training half of them are.
Beside FILE.json a plot FILE.png is written.
"""

import dataclasses
import functools
import pathlib
import statistics
import tempfile
import time
from typing import Any, NamedTuple

import cli
import decoding_flops
from absl import flags

_SUITE = flags.DEFINE_enum("suite", "sampling", ["sampling", "training"], "What to time.")
_SIZE = flags.DEFINE_enum(
    "size",
    "tiny",
    ["tiny", "small", "paper"],
    "tiny: configs/tiny.py; small: 6 layers of 384, 256 tokens; paper: configs' defaults.",
)
_BATCH = flags.DEFINE_list("batch", ["8"], "Texts at a time; of sampling several, as 1,8,32.")
_DECODE_STEPS = flags.DEFINE_integer("decode_steps", 64, "Decoding steps T.", lower_bound=1)
_LATENT_STEPS = flags.DEFINE_integer("latent_steps", 5, "Steps of the student.", lower_bound=1)
_PRIOR_STEPS = flags.DEFINE_integer(
    "prior_steps", 200, "Steps of the undistilled prior.", lower_bound=1
)
_TIMED_STEPS = flags.DEFINE_integer(
    "timed_steps",
    None,
    "Steps of decoding and of the prior that are really run; default all.",
    lower_bound=1,
)
_REFRESH = flags.DEFINE_integer(
    "refresh_every",
    4,
    "R of the approximate sampler; --timed_steps has to be a multiple of it.",
    lower_bound=2,
)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 3, "Times that every case is run, in turns.", lower_bound=1
)
_TOP_P = flags.DEFINE_float("top_p", 0.9, "Nucleus.", lower_bound=0, upper_bound=1)
_OUT = flags.DEFINE_string("out", None, "JSON file.", required=True)

PIECES = ("loss", "gradient", "optimizer", "update")


def settings(size: str) -> Any:
    """The checked config of a size."""
    from diladiff_jax import config

    changes: dict[str, Any] = {}
    if size == "tiny":
        changes = dict(
            data=dict(length=32),
            tokenizer=dict(vocab_size=512),
            backbone=dict(width=96, num_layers=3, heads=4),
            encoder=dict(num_latents=16, latent_dim=32, width=96, heads=4),
            decoder=dict(cross_layers=(0, 2)),
            latent_denoiser=dict(width=128, num_layers=3, heads=4, mlp_ratio=2.75),
        )
    elif size == "small":
        changes = dict(
            data=dict(length=256),
            tokenizer=dict(vocab_size=8192),
            backbone=dict(width=384, num_layers=6, heads=6),
            encoder=dict(num_latents=128, latent_dim=384, width=384, heads=6),
            decoder=dict(cross_layers=(0, 5)),
            latent_denoiser=dict(width=384, num_layers=6, heads=6),
        )
    return config.resolve(changes)


def plain_decode(
    networks: Any,
    params: Any,
    keys: Any,
    prompt: Any,
    latents: Any,
    mask_id: int,
    sampleable: Any,
    steps: Any,
    top_p: Any,
    *,
    sort: bool,
) -> Any:
    """Ancestral decoding written down: every logit in every step, then temperature 1, nucleus and draw for all positions.

    The draws are those of `diladiff_jax.sampling.tokens.ancestral`, so that the tokens can be compared. -> tokens `[B, L]`.
    """
    import jax
    import jax.numpy as jnp

    from diladiff_jax.diffusion.masking import restrict
    from diladiff_jax.sampling import tokens

    def sorted_nucleus(logits: Any) -> Any:
        p = jax.nn.softmax(logits, axis=-1)
        order = jnp.argsort(-p, axis=-1)
        ordered = jnp.take_along_axis(p, order, axis=-1)
        kept = jnp.cumsum(ordered, axis=-1) - ordered < top_p
        return jnp.put_along_axis(
            jnp.zeros_like(p), order, jnp.where(kept, ordered, 0.0), axis=-1, inplace=False
        )

    when_key, what_key = jax.vmap(lambda key: jax.random.split(key))(keys).T
    length = prompt.shape[1:]
    when = jnp.minimum(
        jnp.floor(tokens.uniform_per_sample(when_key, length) * steps).astype(jnp.int32), steps - 1
    )
    uniform = tokens.uniform_per_sample(what_key, length)

    def step(k: Any, x: Any) -> Any:
        logits = restrict(
            networks.decoder.apply({"params": params["decoder"]}, x, latents), sampleable
        )
        p = sorted_nucleus(logits) if sort else tokens.token_distribution(logits, 1.0, top_p)
        return jnp.where((prompt == mask_id) & (when == k), tokens.draw(p, uniform), x)

    return jax.lax.fori_loop(0, steps, step, prompt)


class Program(NamedTuple):
    """A compiled program; the seconds that a start took without and with a stored copy, tracing and lowering among them, which nothing stores, and those
    two alone (the less of both starts'); and the bytes of its temporaries and of all that it holds."""

    run: Any
    cold: float
    cached: float
    tracing: float
    temporaries: int
    held: int

    @property
    def fits(self) -> bool:
        """Whether the device can hold it; where neither is known, it is tried."""
        from diladiff_jax.parallel import sharding

        there = sharding.device_memory()
        return there is None or self.held <= there


def compiled(function: Any, *arguments: Any, times: int = 2) -> Program:
    """Compiles twice: with an empty persistent cache, and again from it (or, with `times=1`, only the first)."""
    import jax

    seconds, tracing = [], []
    for _ in range(times):
        jax.clear_caches()
        start = time.perf_counter()
        lowered = jax.jit(function).lower(*arguments)
        tracing.append(time.perf_counter() - start)
        program = lowered.compile()
        seconds.append(time.perf_counter() - start)
    memory = program.memory_analysis()
    parts = (
        (memory.temp_size_in_bytes, memory.argument_size_in_bytes, memory.output_size_in_bytes)
        if memory is not None
        else (0,)
    )
    return Program(program, seconds[0], seconds[-1], min(tracing), int(parts[0]), int(sum(parts)))


def seconds_of(program: Any, *arguments: Any) -> tuple[float, Any]:
    """Wall-clock seconds of one run, and what it gave."""
    import jax

    start = time.perf_counter()
    result = jax.block_until_ready(program(*arguments))
    return time.perf_counter() - start, result


def matmul_rate(size: int = 2048, rounds: int = 5) -> float:
    """The best rate of a float32 product of two square matrices, in FLOP/s."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((size, size))
    product = jax.jit(lambda x: x @ x).lower(x).compile()
    return 2 * size**3 / min(seconds_of(product, x)[0] for _ in range(rounds))


def random_parameters(module: Any, *inputs: Any) -> Any:
    """Weights of trained size: kernels by fan-in, gains one, nothing left at zero but biases."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))

    def draw(key: Any, path: Any, leaf: Any) -> Any:
        kind = path[-1].key
        if kind in ("scale", "bias"):
            return jnp.full(leaf.shape, float(kind == "scale"))
        return jax.random.normal(key, leaf.shape) * (
            leaf.shape[0] ** -0.5 if kind == "kernel" else 0.02
        )

    return tree.unflatten(
        [draw(key, path, leaf) for key, (path, leaf) in zip(keys, leaves, strict=True)]
    )


def sampling_suite() -> dict[str, Any]:
    """The document of the architecture's "benchmark's JSON": for each batch a row for each way of decoding, and the latents' times."""
    batches, steps = whole_numbers("batch", _BATCH.value), _DECODE_STEPS.value
    timed = _TIMED_STEPS.value or steps
    if timed > steps:
        raise cli.UsageError(f"--timed_steps is {timed}; it must be at most --decode_steps={steps}")
    if timed % _REFRESH.value and timed < steps:
        raise cli.UsageError(
            f"--timed_steps is {timed}; it must be a multiple of --refresh_every={_REFRESH.value}, or all {steps} steps"
        )
    documents = [sampling_rows(batch, steps, timed) for batch in batches]
    measured = [d for d in documents if d["rows"]]
    if not measured:
        needed = min(
            row["held_bytes"] for d in documents for row in d["left_out"] if row["case"] == "ours"
        )
        raise cli.UsageError(
            f"--batch={','.join(_BATCH.value)} needs {needed / 2**30:.1f} GiB of memory, more than there is; make it smaller"
        )
    return {"machine": measured[-1]["machine"]} | {
        part: [row for d in documents for row in d[part]]
        for part in ("rows", "latents", "left_out")
    }


def whole_numbers(name: str, texts: list[str]) -> list[int]:
    """The numbers of a flag that lists them."""
    if not texts or not all(text.strip().isdigit() and int(text) > 0 for text in texts):
        raise cli.UsageError(
            f"--{name} is {','.join(texts)!r}; it must be whole numbers above 0, as 8 or 1,8,32"
        )
    return [int(text) for text in texts]


def sampling_rows(batch: int, steps: int, timed: int) -> dict[str, Any]:
    """Machine, rows, latents and what was left out for one batch."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from diladiff_jax.diffusion.gaussian import make_schedule
    from diladiff_jax.nn.networks import build_networks
    from diladiff_jax.sampling.pipeline import Controls, Sampler

    top_p, refresh = _TOP_P.value, _REFRESH.value
    c = settings(_SIZE.value)
    length, vocab = c.data.length, c.tokenizer.vocab_size
    mask_id, sampleable = vocab - 1, np.arange(vocab) < vocab - 1
    networks = build_networks(c.to_dict(), length, vocab)
    sampler = Sampler(
        networks, make_schedule(c.diffusion.schedule, c.diffusion.d), mask_id, sampleable
    )

    given = np.random.default_rng(0).random((batch, length)) >= timed / steps
    prompt = jnp.asarray(
        np.where(given, np.random.default_rng(1).integers(0, mask_id, (batch, length)), mask_id),
        jnp.int32,
    )
    z, t = jnp.zeros((batch, *networks.latent_shape)), jnp.zeros((batch,))
    params = {
        "decoder": random_parameters(networks.decoder, prompt, z),
        "student": random_parameters(networks.student, z, t, z, t),
    }
    params["teacher"] = {
        name: tree for name, tree in params["student"].items() if name != "interval_time"
    }
    keys = jax.random.split(jax.random.key(1), batch)
    controls = Controls(
        jnp.int32(timed),
        jnp.int32(_LATENT_STEPS.value),
        jnp.float32(1.0),
        jnp.float32(top_p),
        jnp.float32(0.8),
        jnp.float32(0.9),
    )
    prior_timed = min(_TIMED_STEPS.value or _PRIOR_STEPS.value, _PRIOR_STEPS.value)

    def plain(params: Any, keys: Any, prompt: Any, z: Any, controls: Any, *, sort: bool) -> Any:
        return plain_decode(
            networks,
            params,
            keys,
            prompt,
            z,
            mask_id,
            jnp.asarray(sampleable),
            controls.decode_steps,
            controls.top_p,
            sort=sort,
        )

    def decoded(sampler: Sampler, *arguments: Any) -> Any:
        return sampler.decode(*arguments).tokens

    functions = {
        "naive": functools.partial(plain, sort=True),
        "bisection": functools.partial(plain, sort=False),
        "ours": functools.partial(decoded, sampler),
        "approx_skip": functools.partial(
            decoded,
            dataclasses.replace(sampler, skip_layers=decoding_flops.skipped(c.backbone.num_layers)),
        ),
        f"approx_refresh_{refresh}": functools.partial(
            decoded, dataclasses.replace(sampler, refresh_every=refresh)
        ),
    }
    latent_inputs = {
        "student": (params, keys, controls),
        "prior": (params, keys, controls._replace(latent_steps=jnp.int32(prior_timed))),
    }
    latent_programs = {
        "student": compiled(sampler.student_latents, *latent_inputs["student"]),
        "prior": compiled(sampler.prior_latents, *latent_inputs["prior"], times=1),
    }
    h = jnp.ones((batch * length, c.backbone.width))
    maps = compiled(decoding_flops.linear_maps, params["decoder"]["backbone"], h, times=1)
    qkv = (jnp.ones((batch, length, c.backbone.heads, c.backbone.width // c.backbone.heads)),) * 3
    attention = compiled(decoding_flops.attention_products, *qkv, times=1)
    decode = {
        case: compiled(functions[case], params, keys, prompt, z, controls) for case in functions
    }
    cases = [case for case in functions if decode[case].fits] if decode["ours"].fits else []
    left_out = [
        {"suite": "sampling", "size": _SIZE.value, "batch": batch, "case": case, "decode_memory_bytes": decode[case].temporaries, "held_bytes": decode[case].held}
        for case in functions if case not in cases
    ]  # fmt: skip
    if not cases:
        return {"rows": [], "latents": [], "left_out": left_out}

    times: dict[str, list[float]] = {
        name: [] for name in ("student", "prior", "linear maps", "attention products", *cases)
    }
    drawn: dict[str, Any] = {}
    rates = [matmul_rate()]
    for turn in range(_ROUNDS.value):
        for name, program in latent_programs.items():
            seconds, found = seconds_of(program.run, *latent_inputs[name])
            z = found if name == "student" else z
            times[name].append(
                seconds * (_PRIOR_STEPS.value / prior_timed if name == "prior" else 1)
            )
        times["linear maps"].append(seconds_of(maps.run, params["decoder"]["backbone"], h)[0])
        times["attention products"].append(
            c.backbone.num_layers * seconds_of(attention.run, *qkv)[0]
        )
        for case in cases:
            seconds, drawn[case] = seconds_of(decode[case].run, params, keys, prompt, z, controls)
            times[case].append(seconds * steps / timed)
        print(
            f"batch {batch}, round {turn + 1} of {_ROUNDS.value}: "
            + ", ".join(f"{name} {values[-1]:.2f} s" for name, values in times.items()),
            flush=True,
        )
    rates.append(matmul_rate())

    rate, middle = max(rates), {name: statistics.median(values) for name, values in times.items()}
    common_fields = {
        "suite": "sampling",
        "size": _SIZE.value,
        "batch": batch,
        "length": length,
        "rounds": _ROUNDS.value,
    }
    rows = []
    for case in cases:
        total, cold = (
            middle["student"] + middle[case],
            latent_programs["student"].cold + decode[case].cold,
        )
        free = np.asarray(prompt) == mask_id
        rows.append(common_fields | {
            "case": case, "vocab": vocab, "decode_steps": steps, "timed_steps": timed, "latent_steps": _LATENT_STEPS.value, "top_p": top_p,
            "seconds": total, "tokens_per_second": batch * length / total, "first_result_seconds": cold + total,
            "latent_seconds": middle["student"], "decode_seconds": middle[case], "decode_seconds_low": min(times[case]), "decode_seconds_high": max(times[case]),
            "linear_maps_seconds": middle["linear maps"], "attention_products_seconds": middle["attention products"],
            "peak_memory_bytes": max(latent_programs["student"].temporaries, decode[case].temporaries), "decode_memory_bytes": decode[case].temporaries,
            "compile_seconds_cold": cold, "compile_seconds_cached": latent_programs["student"].cached + decode[case].cached,
            "tracing_seconds": latent_programs["student"].tracing + decode[case].tracing,
            "fraction_of_matmul_rate": decoding_flops.decoding_flops(case, c, vocab, batch, steps, refresh) / middle[case] / rate,
            "tokens_as_first": float((np.asarray(drawn[case]) == np.asarray(drawn[cases[0]]))[free].mean()),
        })  # fmt: skip
    numbers = {
        "student": (_LATENT_STEPS.value, _LATENT_STEPS.value),
        "prior": (_PRIOR_STEPS.value, prior_timed),
    }
    latents = [
        common_fields
        | {
            "sampler": name,
            "steps": numbers[name][0],
            "timed_steps": numbers[name][1],
            "seconds": middle[name],
            "seconds_low": min(times[name]),
            "seconds_high": max(times[name]),
        }
        for name in latent_programs
    ]
    machine = {
        "device": jax.devices()[0].device_kind,
        "count": jax.device_count(),
        "matmul_flops_per_second": rate,
    }
    return {"machine": machine, "rows": rows, "latents": latents, "left_out": left_out}


def training_suite() -> dict[str, Any]:
    """The same document with a row for each stage."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np

    from diladiff_jax import config as config_lib
    from diladiff_jax import preflight
    from diladiff_jax.parallel import sharding
    from diladiff_jax.training.optimizer import make_optimizer
    from diladiff_jax.training.state import init_state, make_train_step

    batch, *others = whole_numbers("batch", _BATCH.value)
    if others:
        raise cli.UsageError("--batch must be one number with --suite=training")
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    stages = config_lib.STAGES
    given = settings(_SIZE.value).to_dict()
    for stage in stages:
        given[stage]["batch"] = batch
    given["ladiff"]["self_conditioning"] = (
        1.0  # by batches, and a timed one should not depend on its coin
    )
    c = config_lib.resolve(given)
    experiment = preflight.AbstractExperiment(c, mesh)
    rates, rows = [matmul_rate()], []
    for stage in stages:
        objective = experiment.objective(stage)
        flops = preflight.train_step_program(experiment, stage).flops
        tx, average = make_optimizer(c[stage], objective.group), c[stage].ema
        state = jax.jit(lambda key: nn.unbox(init_state(objective, tx, key, ema=average > 0)))(
            jax.random.key(0)
        )  # noqa: B023
        context = jax.tree.map(
            lambda x: jnp.asarray(
                np.random.default_rng(x.size).normal(size=x.shape) * 0.1 + 1, x.dtype
            ),
            experiment.context(stage),
        )
        tokens = jnp.asarray(
            np.random.default_rng(0).integers(
                0, experiment.tokenizer.mask_id - 2, (batch, c.data.length)
            ),
            jnp.int32,
        )
        read = context.replace(statistics=state.statistics) if state.statistics else context

        def loss(params: Any, read: Any, tokens: Any) -> Any:
            return objective.loss(params, read, tokens, jax.random.key(1), 0)[0]  # noqa: B023

        programs = {
            "loss": (loss, (state.params, read, tokens)),
            "gradient": (jax.grad(loss), (state.params, read, tokens)),
            "optimizer": (
                lambda grads, kept, params: tx.update(grads, kept, params),
                (state.params, state.optimizer, state.params),
            ),  # noqa: B023
            "update": (
                make_train_step(objective, tx, ema=average, accumulate=1),
                (state, context, tokens),
            ),
        }
        made = {
            name: compiled(function, *arguments, times=2 if name == "update" else 1)
            for name, (function, arguments) in programs.items()
        }
        times: dict[str, list[float]] = {name: [] for name in PIECES}
        for _ in range(_ROUNDS.value):
            for name in PIECES:
                times[name].append(seconds_of(made[name].run, *programs[name][1])[0])
        rates.append(matmul_rate())
        middle = {name: statistics.median(times[name]) for name in PIECES}
        rows.append({
            "suite": "training", "case": stage, "size": _SIZE.value, "batch": batch, "length": c.data.length, "vocab": experiment.tokenizer.vocab_size,
            "decode_steps": None, "latent_steps": None, "rounds": _ROUNDS.value, "seconds": middle["update"],
            "seconds_low": min(times["update"]), "seconds_high": max(times["update"]), **{f"{name}_seconds": middle[name] for name in PIECES[:-1]},
            "tokens_per_second": batch * c.data.length / middle["update"], "latent_seconds": None, "decode_seconds": None,
            "peak_memory_bytes": made["update"].temporaries, "compile_seconds_cold": made["update"].cold, "compile_seconds_cached": made["update"].cached,
            "model_flops": flops,
        })  # fmt: skip
    for row in rows:
        row["fraction_of_matmul_rate"] = row["model_flops"] / row["seconds"] / max(rates)
    return {
        "machine": {
            "device": jax.devices()[0].device_kind,
            "count": 1,
            "matmul_flops_per_second": max(rates),
        },
        "rows": rows,
    }


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Seconds of every case on a logarithmic axis, with the range over the rounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    sampling, first = rows[0]["suite"] == "sampling", rows[0]
    name = "decode_seconds" if sampling else "seconds"
    labels = [row["case"] + (f", batch {row['batch']}" if sampling else "") for row in rows]
    # By text, for batches take different times.
    middle, low, high = (
        [row[key] / row["batch"] for row in rows] for key in (name, f"{name}_low", f"{name}_high")
    )
    figure, axis = pyplot.subplots(figsize=(7, 1 + 0.35 * len(rows)), layout="constrained")
    spread = [
        [m - x for m, x in zip(middle, low, strict=True)],
        [x - m for m, x in zip(middle, high, strict=True)],
    ]
    bars = axis.barh(
        labels,
        middle,
        xerr=spread,
        color=[
            f"C{list(dict.fromkeys(row['batch'] for row in rows)).index(row['batch'])}"
            for row in rows
        ],
    )
    axis.bar_label(bars, [f" {m:.3g}" for m in middle])
    axis.set_xscale("log")
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axis.margins(x=0.15)
    axis.invert_yaxis()
    what = (
        f"to decode {first['length']} tokens in {first['decode_steps']} steps"
        if sampling
        else f"of an update on {first['length']} tokens"
    )
    axis.set_xlabel(f"seconds {what}, by text; {_SIZE.value} size")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: list[str]) -> None:
    import jax

    path = pathlib.Path(_OUT.value)
    if path.suffix == ".png" or (path.with_suffix(".png").exists() and not path.exists()):
        raise cli.UsageError(
            f"--out={path}: the plot beside it is {path.with_suffix('.png')}, which must be another file and nobody else's; give FILE.json"
        )
    cli.replaceable("out", path, {"machine", "rows"}, "such result")  # before hours of measuring
    with (
        tempfile.TemporaryDirectory() as empty
    ):  # compiling cold means without what earlier runs stored
        jax.config.update("jax_compilation_cache_dir", empty)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        document = {"sampling": sampling_suite, "training": training_suite}[_SUITE.value]()
    cli.write_json("out", path, document)
    plot(document["rows"], path.with_suffix(".png"))
    rows = document["rows"]
    if _SUITE.value == "training":
        for row in rows:
            print(
                f"{row['case']:12} {1e3 * row['seconds']:9.1f} ms an update ({1e3 * row['seconds_low']:.1f} to {1e3 * row['seconds_high']:.1f}): "
                f"loss {1e3 * row['loss_seconds']:.1f}, with gradient {1e3 * row['gradient_seconds']:.1f}, optimizer {1e3 * row['optimizer_seconds']:.1f}; "
                f"{row['tokens_per_second']:.0f} tokens/s, {row['peak_memory_bytes'] / 2**20:.0f} MiB, compiled in {row['compile_seconds_cold']:.1f} s "
                f"(stored: {row['compile_seconds_cached']:.1f} s), {100 * row['fraction_of_matmul_rate']:.0f}% of the matmul rate"
            )
        return
    for batch in dict.fromkeys(row["batch"] for row in rows):
        report(
            *(
                [row for row in document[part] if row["batch"] == batch]
                for part in ("rows", "latents", "left_out")
            )
        )
    for row in document["left_out"]:
        print(
            f"batch {row['batch']}, {row['case']}: left out, for it needs {row['held_bytes'] / 2**30:.1f} GiB of memory, more than there is"
        )


def report(
    rows: list[dict[str, Any]], latents: list[dict[str, Any]], left_out: list[dict[str, Any]]
) -> None:
    """Prints what was measured at one batch, and the ratios that the library is judged by."""
    first = rows[0]
    print(
        f"batch {first['batch']}, {first['length']} tokens, {first['decode_steps']} steps"
        + (
            f", scaled from {first['timed_steps']} timed steps"
            if first["timed_steps"] < first["decode_steps"]
            else ""
        )
    )
    for row in rows:
        print(
            f"{row['case']:17} {row['decode_seconds']:9.2f} s decoding ({row['decode_seconds_low']:.2f} to {row['decode_seconds_high']:.2f}), "
            f"{row['latent_seconds']:.2f} s latent, {row['tokens_per_second']:.0f} tokens/s, {row['decode_memory_bytes'] / 2**20:.0f} MiB, "
            f"first after {row['first_result_seconds']:.1f} s, compiled in {row['compile_seconds_cold']:.1f} s (stored: {row['compile_seconds_cached']:.1f} s), "
            f"{100 * row['fraction_of_matmul_rate']:.0f}% of the matmul rate, tokens as {first['case']} {100 * row['tokens_as_first']:.2f}%"
        )
    for row in latents:
        print(
            f"latents, {row['sampler']}: {row['seconds']:.2f} s for {row['steps']} steps ({row['timed_steps']} timed)"
        )
    by_case = {row["case"]: row for row in rows}
    ours = by_case["ours"]
    step, together = (
        ours["decode_seconds"]
        / decoding_flops.busy(ours["batch"] * ours["length"], ours["decode_steps"]),
        ours["linear_maps_seconds"] + ours["attention_products_seconds"],
    )
    plain, quick = (
        [case for case in ("naive", "bisection") if case in by_case],
        [row["case"] for row in rows[rows.index(ours) :]],
    )
    ratios = [
        f"{slow} over {fast} {by_case[slow]['decode_seconds'] / by_case[fast]['decode_seconds']:.2f}"
        for slow in plain
        for fast in quick
    ]
    cold, stored, tracing = (
        ours["compile_seconds_cold"],
        ours["compile_seconds_cached"],
        ours["tracing_seconds"],
    )
    memory = {row["case"]: row["decode_memory_bytes"] for row in rows + left_out}
    print(
        f"{', '.join(ratios)}; a step of ours over the backbone's products {step / together:.2f}, over its linear maps alone {step / ours['linear_maps_seconds']:.2f}; "
        f"student's latents {100 * ours['latent_seconds'] / ours['decode_seconds']:.1f}% of decoding; memory {100 * memory['ours'] / memory['naive']:.0f}% of naive's; "
        f"a stored start {100 * stored / cold:.0f}% of the first, without tracing {100 * (stored - tracing) / (cold - tracing):.0f}%"
    )


if __name__ == "__main__":
    cli.run(main, __doc__)
