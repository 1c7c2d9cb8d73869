"""Costs counted from HLO text, compared with closed forms and with the compiler's own count.

The compiler counts the body of a loop once, so the comparison is with the same program unrolled.
"""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diladiff_jax.parallel import sharding
from diladiff_jax.preflight import hlo

LAYERS, BATCH, WIDTH = 5, 16, 32


def compiled(function, *arguments, **options):
    return jax.jit(function, **options).lower(*arguments).compile()


def totals(text, *unknown_trips):
    return hlo.totals(hlo.program_costs(hlo.parse(text), unknown_trips))


def counted(program, *unknown_trips):
    return totals(program.as_text(), *unknown_trips)


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def network(weights, x, *, scan):
    """Layers with a product, a tanh and a residual, and a mean square at the end."""
    body = lambda h, w: (jnp.tanh(h @ w) * 0.5 + h, None)
    if scan:
        h, _ = jax.lax.scan(body, x, weights)
    else:
        h = functools.reduce(lambda h, i: body(h, weights[i])[0], range(LAYERS), x)
    return jnp.square(h).mean()


@pytest.fixture(scope="module")
def programs():
    """The compiled gradient of the network by `scan`: False is unrolled, True a loop."""
    return {
        scan: compiled(
            jax.grad(functools.partial(network, scan=scan)),
            shape(LAYERS, WIDTH, WIDTH),
            shape(BATCH, WIDTH),
        )
        for scan in (False, True)
    }


def test_products_cost_2mnk_for_any_contracted_and_batch_dimensions():
    for spec, a, b, expected in (
        ("mk,kn->mn", (3, 5), (5, 7), 2 * 3 * 5 * 7),
        ("km,kn->mn", (5, 3), (5, 7), 2 * 3 * 5 * 7),
        ("bhlk,bhmk->bhlm", (2, 4, 8, 16), (2, 4, 6, 16), 2 * 2 * 4 * 8 * 6 * 16),
    ):
        assert (
            counted(compiled(functools.partial(jnp.einsum, spec), shape(*a), shape(*b))).flops
            == expected
        )


@pytest.mark.parametrize(
    ("strides", "padding", "dilation"),
    [((1, 1), "SAME", (1, 1)), ((2, 1), "VALID", (1, 1)), ((1, 1), ((2, 1), (0, 3)), (2, 3))],
)
def test_padding_and_holes_of_a_convolution_cost_nothing(strides, padding, dilation):
    """The compiler counts convolutions the same way."""
    convolve = functools.partial(
        jax.lax.conv_general_dilated, window_strides=strides, padding=padding, lhs_dilation=dilation
    )
    program = compiled(convolve, shape(2, 3, 9, 8), shape(5, 3, 3, 2))
    expected = hlo.parse(program.as_text())
    if not any(
        i.opcode == "convolution"
        for c in expected.computations.values()
        for i in c.instructions.values()
    ):
        pytest.skip("this backend compiles the convolution to something else")
    assert counted(program).flops == program.cost_analysis()["flops"]


def test_a_batched_product_written_as_a_convolution_costs_the_same():
    """TPU programs make the batch a spatial dimension; each element meets one window position."""
    text = """HloModule m, is_scheduled=true

ENTRY %main (a: bf16[12,8,64], b: bf16[12,64,16]) -> bf16[12,8,16] {
  %a = bf16[12,8,64]{2,1,0} parameter(0)
  %b = bf16[12,64,16]{2,1,0} parameter(1)
  ROOT %c = bf16[12,8,16]{2,1,0} convolution(%a, %b), window={size=12 stride=11 lhs_dilate=12}, \
dim_labels=0bf_0io->0bf
}
"""
    assert totals(text).flops == 2 * 12 * 8 * 64 * 16


def test_a_program_without_loops_agrees_with_the_compilers_count(programs):
    found, theirs = counted(programs[False]), programs[False].cost_analysis()
    assert found.flops == 2 * BATCH * WIDTH**2 * (3 * LAYERS - 1)  # the input has no gradient
    assert found.flops + found.elementwise == theirs["flops"]
    assert found.transcendentals == theirs["transcendentals"]


def test_a_loop_counts_once_per_iteration(programs):
    """A scan over the layers has the products of all layers; the compiler counts one layer."""
    looped, plain = counted(programs[True]), counted(programs[False])
    # The loop also computes the gradient of the first layer's input.
    assert looped.flops == plain.flops + 2 * BATCH * WIDTH**2
    assert looped.transcendentals == plain.transcendentals
    assert programs[True].cost_analysis()["flops"] < looped.flops / 2


def test_trip_counts_without_an_annotation_come_from_the_condition(programs):
    text = programs[True].as_text()
    assert "known_trip_count" in text
    bare = re.sub(r'"known_trip_count":\{"n":"\d+"\}', '"nothing":{}', text)
    assert totals(bare) == totals(text)


def test_given_trip_counts_apply_to_unknown_loops_by_depth():
    """The first count is the outer loop's, the second the inner one's; static loops keep theirs."""

    def function(x, n, m):
        inner = lambda _, y: jax.lax.fori_loop(0, 3, lambda _, z: z @ x, y)
        return jax.lax.fori_loop(0, n, lambda _, y: jax.lax.fori_loop(0, m, inner, y), x)

    program = compiled(function, shape(8, 8), shape(dtype=jnp.int32), shape(dtype=jnp.int32))
    assert len(hlo.unknown_loops(hlo.parse(program.as_text()))) == 2
    once = 2 * 8**3 * 3
    assert counted(program).flops == once
    assert counted(program, 7.0).flops == 7 * once
    assert counted(program, 7.0, 2.5).flops == 17.5 * once


def test_the_most_expensive_branch_of_a_conditional_counts():
    program = compiled(
        lambda x, p: jax.lax.cond(p, lambda: x @ x @ x, lambda: x @ x),
        shape(8, 8),
        shape(dtype=jnp.bool_),
    )
    assert counted(program).flops == 2 * 2 * 8**3


@pytest.mark.parametrize("loops", [1, 3])
def test_collectives_count_the_bytes_of_the_complete_array(loops):
    """Eight devices exchange 8 x 64 floats, of which each holds one part of 64, `loops` times."""
    mesh = sharding.make_mesh({"data": 8, "fsdp": 1, "tensor": 1})
    part, ring = 64 * 4, [(i, (i + 1) % 8) for i in range(8)]
    cases = {
        "all-reduce": (lambda x: jax.lax.psum(x, "data") / 8, part),
        "all-gather": (lambda x: jax.lax.all_gather(x, "data", tiled=True)[:1] * 2, 8 * part),
        "reduce-scatter": (
            lambda x: jnp.tile(
                jax.lax.psum_scatter(x, "data", scatter_dimension=1, tiled=True), (1, 8)
            ),
            part,
        ),
        "collective-permute": (lambda x: jax.lax.ppermute(x, "data", ring), part),
        "all-to-all": (
            lambda x: jax.lax.all_to_all(x.reshape(8, 8), "data", 0, 0, tiled=True).reshape(1, 64),
            part,
        ),
    }
    for kind, (exchange, size) in cases.items():
        body = lambda x, exchange=exchange: jax.lax.fori_loop(0, loops, lambda _, y: exchange(y), x)
        function = jax.shard_map(
            body,
            mesh=mesh,
            in_specs=PartitionSpec("data"),
            out_specs=PartitionSpec("data"),
            check_vma=False,
        )
        x = jax.ShapeDtypeStruct(
            (8, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data"))
        )
        found = counted(compiled(function, x)).collectives
        assert found == {kind: (loops, loops * size)}


def test_groups_of_devices_are_read_in_every_form():
    """Groups may be explicit, a (transposed) iota, or axes of a mesh or factors of them."""
    for text, group in (
        ("replica_groups={{0,2},{1,3}}, x", (0, 2)),
        ("replica_groups=[2,4]<=[8], x", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}, x", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}, x", (0, 1)),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=4], device_ids=([2,2,2]T(1,0,2)) {'b'}, x", (0, 2)),
        (
            "replica_groups=mesh['a'=1,'b'=2,'c'=4], device_ids=([2,2,2]T(1,0,2)) {'c'}, x",
            (0, 1, 4, 5),
        ),
        ("replica_groups={}, x", ()),
    ):
        assert hlo.replica_group(text) == group, text
    text = """HloModule m, is_scheduled=true, num_partitions=4

ENTRY %main (a: f32[8]) -> f32[32] {
  %a = f32[8]{0} parameter(0)
  ROOT %g = f32[32]{0} all-gather(%a), channel_id=1, replica_groups={}, dimensions={0}
}
"""
    assert totals(text).collectives == {"all-gather": (1, 32 * 4)}  # no group means all devices
    with pytest.raises(ValueError, match="unknown form of replica_groups"):
        hlo.replica_group("replica_groups=something else")


def test_a_loop_over_rows_of_a_table_reads_the_table_once():
    """Slicing a row reads that row, not the table; a plain sum reads two arrays and writes one."""
    rows, width = 64, 4096
    plain = counted(compiled(lambda a, b: a + b, shape(rows, width), shape(rows, width))).bytes
    assert plain == 3 * rows * width * 4
    table = rows * width * 4
    looped = counted(
        compiled(
            lambda t, x: jax.lax.scan(lambda h, row: (h + row, h), x, t),
            shape(rows, width),
            shape(width),
        )
    )
    # Per row: the row, the carry and the output, each read and written a small number of times.
    assert 3 * table <= looped.bytes <= 10 * table


# Excerpt of a training step compiled for four TPU v5e devices, with a splash attention kernel.
TPU = (pathlib.Path(__file__).parent / "tpu_step.hlo").read_text()


@pytest.fixture(scope="module")
def tpu_costs():
    """Costs of the TPU program, by name of the instruction."""
    return {c.instruction: c for c in hlo.program_costs(hlo.parse(TPU))}


def test_float32_products_at_highest_precision_take_six_passes(tpu_costs):
    assert tpu_costs["product"].flops == 2 * 256 * 512 * 128
    assert tpu_costs["product"].passes == 6 * tpu_costs["product"].flops


def test_splash_attention_is_counted_and_other_kernels_are_named(tpu_costs):
    assert tpu_costs["attended"].flops == 4 * 4 * 12 * 1024 * 2048 * 64
    assert tpu_costs["attended"].uncounted_kernel is None
    assert totals(TPU).uncounted_kernels == {"my_kernel": 1}


def test_an_asynchronous_collective_counts_once_and_as_overlapped(tpu_costs):
    """The program names it three times: at its start, at its end, and beside the product."""
    assert totals(TPU).collectives["all-gather"] == (1, 1024 * 512 * 2)
    assert tpu_costs["started"].collective.overlapped
    assert tpu_costs["started"].collective.group == (0, 2)


def test_a_slice_of_an_all_reduce_is_a_reduce_scatter(tpu_costs):
    assert totals(TPU).collectives["reduce-scatter"] == (1, 256 * 128 * 4)
    assert not tpu_costs["shared"].collective.overlapped


def test_buffers_on_the_chip_do_not_cross_main_memory(tpu_costs):
    assert tpu_costs["product"].bytes == 4 * (256 * 512 + 256 * 128)
    assert tpu_costs["ended"].bytes == 0


def test_shapes_have_their_size_and_memory_space():
    assert [
        hlo.bits(t) for t in ("pred", "bf16", "f32", "s4", "u8", "f8e4m3fn", "token", "c64")
    ] == [8, 16, 32, 4, 8, 8, 0, 64]
    found = hlo.parse_shape(
        "(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[]{:T(128)}, s4[3]{0})"
    )
    assert [(b.bytes, b.main_bytes) for b in found] == [(2048, 0), (4, 4), (2, 2)]


def test_text_without_an_entry_computation_is_rejected():
    with pytest.raises(ValueError, match="entry computation"):
        hlo.parse("not a program")
