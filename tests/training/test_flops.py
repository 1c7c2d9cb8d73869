"""Model FLOPs: closed forms of small losses, and agreement with the compiled training step."""

import jax
import jax.numpy as jnp
import pytest
from micro import micro_config

from diladiff_jax import preflight
from diladiff_jax.parallel import sharding
from diladiff_jax.preflight import hlo
from diladiff_jax.training.flops import model_flops

N, ONCE = 8, 2 * 8**3
SQUARE = jax.ShapeDtypeStruct((N, N), jnp.float32)


def flops(loss, others=1):
    """Model FLOPs in units of one product, of the sum of `loss(w, *others)`."""
    return model_flops(lambda w, *x: loss(w, *x).sum(), SQUARE, *[SQUARE] * others) / ONCE


def test_a_product_costs_one_more_for_each_factor_that_needs_a_gradient():
    """Two if only the weights need one, three with the activations, one without any gradient."""
    assert flops(lambda w, x: x @ w) == 2
    assert flops(lambda w, x: jnp.tanh(x @ w) @ w) == 2 + 3
    assert flops(lambda w, x: x @ x + w) == 1
    assert flops(lambda w, x: jax.lax.stop_gradient(x @ w) @ w) == 1 + 2
    assert flops(lambda w, x: x @ w + jax.lax.stop_gradient(jnp.tanh(x @ w) @ w)) == 2 + 2
    assert flops(lambda w, x, y: x @ y @ w, others=2) == 1 + 2


def layer(h, w):
    return jnp.tanh(h @ w)


def chain(w, x):
    """Three layers: the first input needs no gradient, so 2 + 3 + 3 products."""
    return layer(layer(layer(x, w), w), w)


def either(w, x):
    """The chain, or one product with 2."""
    return jax.lax.cond(w[0, 0] > 0, lambda: chain(w, x), lambda: x @ w)


def test_a_scan_costs_its_body_in_every_iteration():
    assert flops(lambda w, x: jax.lax.fori_loop(0, 3, lambda _, h: layer(h, w), x)) == 3 * 3


def test_rematerialization_is_not_counted():
    assert flops(chain) == flops(jax.checkpoint(chain)) == flops(jax.jit(chain)) == 8


def test_a_conditional_costs_its_most_expensive_branch_or_the_mean_at_a_probability():
    assert flops(either) == 8
    mean = model_flops(
        lambda w, x: either(w, x).sum(), SQUARE, SQUARE, expensive_branch_probability=0.25
    )
    assert mean / ONCE == 0.25 * 8 + 0.75 * 2


def test_a_tangent_that_the_loss_does_not_use_is_computed_but_has_no_gradient():
    assert flops(lambda w, x: jax.jvp(lambda v: layer(v, w), (x,), (x,))[0]) == 2 + 1


def test_products_in_a_loop_of_unknown_length_are_an_error():
    with pytest.raises(ValueError, match="unknown number of iterations"):
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
def test_model_flops_agree_with_the_compiled_step(stage):
    """The two counts share no code: one reads the traced loss, the other the compiled update.

    AdamW has no matrix products.
    """
    config = micro_config(**{stage: dict(optimizer="adamw")})
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    with jax.numpy_rank_promotion("allow"):  # inside optax
        experiment = preflight.AbstractExperiment(config, mesh)
        program = preflight.train_step_program(experiment, stage)
        module = hlo.parse(program.lower().compile().as_text())
    counted = hlo.totals(hlo.program_costs(module))
    assert counted.flops == pytest.approx(program.flops, rel=0.02)
