"""Counting from HLO text: against closed forms, against the compiler's own count of the same program without loops, and against itself."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diladiff_jax.parallel import sharding
from diladiff_jax.preflight import hlo, hlo_costs

LAYERS, BATCH, WIDTH = 5, 16, 32


def compiled(function, *arguments, **options):
    return jax.jit(function, **options).lower(*arguments).compile()


def counted(program, *unknown_trips):
    return hlo_costs.totals(hlo_costs.costs(hlo.parse(program.as_text()), unknown_trips))


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def network(weights, x, *, scan):
    """Layers with a gain, a bias, a tanh and a residual; a mean square at the end."""
    body = lambda h, w: (jnp.tanh(h @ w) * 0.5 + h, None)
    if scan:
        h, _ = jax.lax.scan(body, x, weights)
    else:
        h = functools.reduce(lambda h, i: body(h, weights[i])[0], range(LAYERS), x)
    return jnp.square(h).mean()


@pytest.fixture(scope="module")
def programs():
    """The gradient of the network: layers one by one, and as a loop."""
    return {
        scan: compiled(
            jax.grad(functools.partial(network, scan=scan)),
            shape(LAYERS, WIDTH, WIDTH),
            shape(BATCH, WIDTH),
        )
        for scan in (False, True)
    }


def test_products_have_their_closed_form():
    """2 m n k, with batch dimensions and whichever axes are contracted."""
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
def test_convolutions_count_what_meets_an_element(strides, padding, dilation):
    """As the compiler counts them: padding and holes are no work."""
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
        pytest.skip("this backend writes the convolution as something else")
    assert counted(program).flops == program.cost_analysis()["flops"]


def test_a_batched_product_written_as_a_convolution_is_a_batched_product():
    """The form in TPU programs: the batch is a spatial dimension, of whose window one position falls on each element."""
    text = """HloModule m, is_scheduled=true

ENTRY %main (a: bf16[12,8,64], b: bf16[12,64,16]) -> bf16[12,8,16] {
  %a = bf16[12,8,64]{2,1,0} parameter(0)
  %b = bf16[12,64,16]{2,1,0} parameter(1)
  ROOT %c = bf16[12,8,16]{2,1,0} convolution(%a, %b), window={size=12 stride=11 lhs_dilate=12}, dim_labels=0bf_0io->0bf
}
"""
    assert hlo_costs.totals(hlo_costs.costs(hlo.parse(text))).flops == 2 * 12 * 8 * 64 * 16


def test_a_program_without_loops_counts_as_the_compiler_does(programs):
    """Products, elementwise work and transcendentals of a network and its gradient."""
    found, theirs = counted(programs[False]), programs[False].cost_analysis()
    assert found.flops == 2 * BATCH * WIDTH**2 * (3 * LAYERS - 1)  # the input has no gradient
    assert found.flops + found.elementwise == theirs["flops"]
    assert found.transcendentals == theirs["transcendentals"]


def test_a_loop_counts_as_often_as_it_runs(programs):
    """The same network as a scan: the same products, where the compiler sees one layer."""
    looped, plain = counted(programs[True]), counted(programs[False])
    # In a loop the first layer is no special case: its input's gradient is made too.
    assert looped.flops == plain.flops + 2 * BATCH * WIDTH**2
    assert looped.transcendentals == plain.transcendentals
    assert programs[True].cost_analysis()["flops"] < looped.flops / 2


def test_trips_are_read_from_the_condition_where_the_compiler_does_not_note_them(programs):
    """With the notes taken out the count is the same."""
    text = programs[True].as_text()
    assert "known_trip_count" in text
    bare = re.sub(r'"known_trip_count":\{"n":"\d+"\}', '"nothing":{}', text)
    assert hlo_costs.totals(hlo_costs.costs(hlo.parse(bare))) == hlo_costs.totals(
        hlo_costs.costs(hlo.parse(text))
    )


def test_loops_of_unknown_length_take_the_numbers_that_are_given():
    """By depth: the outer number, times the inner one; static loops inside keep their own."""

    def function(x, n, m):
        inner = lambda _, y: jax.lax.fori_loop(0, 3, lambda _, z: z @ x, y)
        return jax.lax.fori_loop(0, n, lambda _, y: jax.lax.fori_loop(0, m, inner, y), x)

    program = compiled(function, shape(8, 8), shape(dtype=jnp.int32), shape(dtype=jnp.int32))
    assert len(hlo.unknown_loops(hlo.parse(program.as_text()))) == 2
    once = 2 * 8**3 * 3
    assert counted(program).flops == once
    assert counted(program, 7.0).flops == 7 * once
    assert counted(program, 7.0, 2.5).flops == 17.5 * once


def test_the_dearest_branch_counts():
    """Of a conditional."""
    program = compiled(
        lambda x, p: jax.lax.cond(p, lambda: x @ x @ x, lambda: x @ x),
        shape(8, 8),
        shape(dtype=jnp.bool_),
    )
    assert counted(program).flops == 2 * 2 * 8**3


@pytest.mark.parametrize("loops", [1, 3])
def test_collectives_carry_the_whole_array(loops):
    """On eight devices, an array of 8 x 64 floats in eight parts, or one such part on each: kind, number and bytes; so many times in a loop."""
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
    """One by one, as an iota, transposed, and as axes of a mesh or parts of them."""
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
    assert hlo_costs.totals(hlo_costs.costs(hlo.parse(text))).collectives == {
        "all-gather": (1, 32 * 4)
    }  # no group named: all devices
    with pytest.raises(ValueError, match="not known"):
        hlo.replica_group("replica_groups=something else")


def test_bytes_are_those_that_an_instruction_touches():
    """A sum of two arrays reads both and writes one; a loop over the rows of a table reads the table once, not once a row."""
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
    # The row, the state before, and what is kept of it: each read and written a small number of times, never the whole table.
    assert 3 * table <= looped.bytes <= 10 * table


TPU = """HloModule jit_step, is_scheduled=true

FileNames
1 "a.py"

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %z = f32[]{:T(128)} add(%x, %y)
}

%start (p: bf16[1,512,512]) -> (bf16[1,512,512], bf16[1,1024,512], u32[]) {
  %p = bf16[1,512,512]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %gather.1 = bf16[1,1024,512]{2,1,0:T(8,128)(2,1)} all-gather(%p), channel_id=26, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={1}, use_global_device_ids=true
  ROOT %s = (bf16[1,512,512]{2,1,0:T(8,128)(2,1)S(1)}, bf16[1,1024,512]{2,1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%through (p0: bf16[1,512,512], p1: f32[256,512], p2: f32[512,128]) -> f32[256,128] {
  %p0 = bf16[1,512,512]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %gather.2 = bf16[1,1024,512]{2,1,0:T(8,128)(2,1)} all-gather(%p0), channel_id=26, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={1}, use_global_device_ids=true
  %p1 = f32[256,512]{1,0:T(8,128)} parameter(1)
  %p2 = f32[512,128]{1,0:T(8,128)S(1)} parameter(2)
  ROOT %c = f32[256,128]{1,0:T(8,128)} convolution(%p1, %p2), dim_labels=bf_io->bf, operand_precision={highest,highest}
}

%end (q: bf16[1,512,512]) -> bf16[1,1024,512] {
  %q = bf16[1,512,512]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %gather.3 = bf16[1,1024,512]{2,1,0:T(8,128)(2,1)} all-gather(%q), channel_id=26, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={1}, use_global_device_ids=true
  ROOT %d = bf16[1,1024,512]{2,1,0:T(8,128)(2,1)S(1)} custom-call(%q, %gather.3), custom_call_target="AsyncCollectiveDone"
}

%scatter (r: f32[256,128]) -> f32[128,128] {
  %r = f32[256,128]{1,0:T(8,128)} parameter(0)
  %sum = f32[256,128]{1,0:T(8,128)} all-reduce(%r), channel_id=27, replica_groups={{0,1},{2,3}}, to_apply=%add
  %zero = s32[]{:T(128)} constant(0)
  ROOT %part = f32[128,128]{1,0:T(8,128)} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={128,128}
}

ENTRY %main (a: bf16[1,512,512], b: f32[256,512], w: f32[512,128], q: bf16[4,12,1024,64], k: bf16[4,12,2048,64]) -> (f32[128,128], bf16[4,12,1024,64]) {
  %a = bf16[1,512,512]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %b = f32[256,512]{1,0:T(8,128)} parameter(1)
  %w = f32[512,128]{1,0:T(8,128)S(1)} parameter(2)
  %q = bf16[4,12,1024,64]{3,2,1,0} parameter(3)
  %k = bf16[4,12,2048,64]{3,2,1,0} parameter(4)
  %started = (bf16[1,512,512]{2,1,0:T(8,128)(2,1)S(1)}, bf16[1,1024,512]{2,1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) fusion(%a), kind=kCustom, calls=%start
  %product = f32[256,128]{1,0:T(8,128)} fusion(%a, %b, %w), kind=kOutput, calls=%through
  %ended = bf16[1,1024,512]{2,1,0:T(8,128)(2,1)S(1)} fusion(%a), kind=kCustom, calls=%end
  %shared = f32[128,128]{1,0:T(8,128)} fusion(%product), kind=kCustom, calls=%scatter
  %attended = (bf16[4,12,1024,64]{3,2,1,0}) custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(step)/shard_map/splash_mha_fwd_residuals/pallas_call"}, backend_config={"custom_call_config":{"body":"AA=="}}
  %out = bf16[4,12,1024,64]{3,2,1,0} get-tuple-element(%attended), index=0
  %strange = bf16[4,12,1024,64]{3,2,1,0} custom-call(%out), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/my_kernel"}
  ROOT %t = (f32[128,128]{1,0:T(8,128)}, bf16[4,12,1024,64]{3,2,1,0}) tuple(%shared, %strange)
}
"""


def test_what_is_special_in_a_tpus_program():
    """An exchange that runs beside a product counts once; a summed slice is a reduce-scatter; full precision takes six passes; splash
    attention is known, another kernel is named; what lies in the chip's own memory crosses no main memory."""
    found = hlo_costs.totals(hlo_costs.costs(hlo.parse(TPU)))
    product, attention = 2 * 256 * 512 * 128, 4 * 4 * 12 * 1024 * 2048 * 64
    assert found.flops == product + attention and found.passes == 6 * product + attention
    assert found.collectives == {
        "all-gather": (1, 1024 * 512 * 2),
        "reduce-scatter": (1, 256 * 128 * 4),
    }
    assert found.unseen == {"my_kernel": 1}
    costs = {c.instruction: c for c in hlo_costs.costs(hlo.parse(TPU))}
    assert (
        costs["started"].collective.overlapped
        and costs["started"].collective.group == (0, 2)
        and not costs["shared"].collective.overlapped
    )
    assert costs["product"].bytes == 4 * (256 * 512 + 256 * 128) and costs["ended"].bytes == 0


def test_types_have_their_size():
    """Bits, memory spaces and tuples."""
    assert [
        hlo.bits(t) for t in ("pred", "bf16", "f32", "s4", "u8", "f8e4m3fn", "token", "c64")
    ] == [8, 16, 32, 4, 8, 8, 0, 64]
    found = hlo.parse_shape(
        "(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[]{:T(128)}, s4[3]{0})"
    )
    assert [(b.bytes, b.main_bytes) for b in found] == [(2048, 0), (4, 4), (2, 2)]


def test_text_that_is_no_program_is_refused():
    """In words."""
    with pytest.raises(ValueError, match="entry computation"):
        hlo.parse("not a program")
    assert np.isfinite(hlo_costs.totals([]).flops)
