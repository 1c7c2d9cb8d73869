"""Model FLOPs: closed forms of what gradients cost, and agreement with what is counted in the compiled gradient."""

import jax
import jax.numpy as jnp
import pytest
from micro import micro_config

from diladiff_jax.parallel import sharding
from diladiff_jax.preflight import aot, hlo, hlo_costs
from diladiff_jax.training.flops import model_flops

N, ONCE = 8, 2 * 8**3
SQUARE = jax.ShapeDtypeStruct((N, N), jnp.float32)


def flops(loss, others=1):
    return model_flops(lambda w, *x: loss(w, *x).sum(), SQUARE, *[SQUARE] * others) / ONCE


def test_a_product_costs_once_more_for_each_factor_with_a_gradient():
    """Weights alone two, weights and activations three, nothing but data one, under a stopped gradient one."""
    assert flops(lambda w, x: x @ w) == 2
    assert flops(lambda w, x: jnp.tanh(x @ w) @ w) == 2 + 3
    assert flops(lambda w, x: x @ x + w) == 1
    assert flops(lambda w, x: jax.lax.stop_gradient(x @ w) @ w) == 1 + 2
    assert flops(lambda w, x: x @ w + jax.lax.stop_gradient(jnp.tanh(x @ w) @ w)) == 2 + 2
    assert flops(lambda w, x, y: x @ y @ w, others=2) == 1 + 2


def test_loops_branches_and_rematerialization():
    """A scan counts its trips, a conditional its dearest branch or the mean at a given probability of it, and what is made anew for the gradient is not the model's."""
    layer = lambda h, w: jnp.tanh(h @ w)
    chain = lambda w, x: layer(layer(layer(x, w), w), w)
    assert flops(chain) == 2 + 3 + 3
    assert flops(lambda w, x: jax.lax.fori_loop(0, 3, lambda _, h: layer(h, w), x)) == 3 * 3
    assert flops(jax.checkpoint(chain)) == flops(jax.jit(chain)) == 8
    assert flops(lambda w, x: jax.lax.cond(w[0, 0] > 0, lambda: chain(w, x), lambda: x @ w)) == 8
    either = lambda w, x: jax.lax.cond(w[0, 0] > 0, lambda: chain(w, x), lambda: x @ w).sum()
    assert (
        model_flops(either, SQUARE, SQUARE, expensive_branch_probability=0.25) / ONCE
        == 0.25 * 8 + 0.75 * 2
    )
    assert (
        flops(lambda w, x: jax.jvp(lambda v: layer(v, w), (x,), (x,))[0]) == 2 + 1
    )  # the tangent is not asked for by the loss, but made
    with pytest.raises(ValueError, match="unknown number of trips"):
        model_flops(
            lambda w: jax.lax.while_loop(lambda h: h[0, 0] < 1, lambda h: h @ w, w).sum(), SQUARE
        )


@pytest.mark.parametrize(
    "stage",
    [
        "mdlm",
        *(
            pytest.param(stage, marks=pytest.mark.slow)
            for stage in ("autoencoder", "ladiff", "diladiff")
        ),
    ],
)
def test_model_flops_are_those_of_the_compiled_step(stage):
    """Two counts that share nothing: the trace of the loss by its factors, and the products in the compiled update's text. AdamW makes none."""
    config = micro_config(**{stage: dict(optimizer="adamw")})
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    with jax.numpy_rank_promotion("allow"):  # optax promotes
        program = aot.train_step(aot.AbstractExperiment(config, mesh), stage)
        counted = hlo_costs.totals(hlo_costs.costs(hlo.parse(program.lower().compile().as_text())))
    assert counted.flops == pytest.approx(program.flops, rel=0.02)
