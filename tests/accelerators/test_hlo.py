"""The reader of compiled programs, on programs whose counts are known."""

import _hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _hlo_text import parse
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P


# Written by hand in the form in which the GPU's compiler (names with %, known number of
# turns) and the TPU's (memory spaces, no number of turns, comments) print theirs.
GPU = """
HloModule step, is_scheduled=true

%scaled (a: f32[8,4], i: s32[]) -> f32[1,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,4]{1,0} dynamic-slice(%a, %i, %zero), dynamic_slice_sizes={1,4}
  ROOT %twice = f32[1,4]{1,0} add(%row, %row)
}

%stored (a: f32[8,4], row: f32[1,4], i: s32[]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %row = f32[1,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %new = f32[8,4]{1,0} dynamic-update-slice(%a, %row, %i, %zero)
}

%body (t: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %a = f32[8,4]{1,0} get-tuple-element(%t), index=1
  %scaled.1 = f32[1,4]{1,0} fusion(%a, %i), kind=kLoop, calls=%scaled
  %stored.1 = f32[8,4]{1,0} fusion(%a, %scaled.1, %i), kind=kLoop, calls=%stored
  ROOT %out = (s32[], f32[8,4]{1,0}) tuple(%i, %stored.1)
}

%test (t: (s32[], f32[8,4])) -> pred[] {
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%short (t: (f32[8,4])) -> f32[8,4] {
  %t = (f32[8,4]{1,0}) parameter(0)
  ROOT %a = f32[8,4]{1,0} get-tuple-element(%t), index=0
}

%long (t: (f32[8,4])) -> f32[8,4] {
  %t = (f32[8,4]{1,0}) parameter(0)
  %a = f32[8,4]{1,0} get-tuple-element(%t), index=0
  %solved = f32[8,4]{1,0} custom-call(%a), custom_call_target="library"
  ROOT %copied = f32[8,4]{1,0} copy(%solved)
}

ENTRY %main (p: pred[], a: f32[8,4]) -> f32[8,4] {
  %p = pred[] parameter(0)
  %a = f32[8,4]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %t = (s32[], f32[8,4]{1,0}) tuple(%zero, %a)
  %loop = (s32[], f32[8,4]{1,0}) while(%t), condition=%test, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %b = f32[8,4]{1,0} get-tuple-element(%loop), index=1
  %gather-start = (f32[8,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%b), channel_id=1
  %gather-done = f32[16,4]{1,0} all-gather-done(%gather-start)
  %u = (f32[8,4]{1,0}) tuple(%b)
  ROOT %choice = f32[8,4]{1,0} conditional(%p, %u, %u), true_computation=%long, \
false_computation=%short
}
"""

TPU = """
HloModule step, is_scheduled=true

%begin (a: bf16[4,2]) -> (bf16[4,2], bf16[8,2], u32[], u32[], u32[], /*index=5*/u32[]) {
  %a = bf16[4,2]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %gather = bf16[8,2]{1,0:T(8,128)(2,1)} all-gather(%a), channel_id=3, dimensions={0}
  ROOT %call = (bf16[4,2]{1,0}, bf16[8,2]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}, u32[]{:S(2)}, \
/*index=5*/u32[]{:S(2)}) custom-call(%gather), custom_call_target="AsyncCollectiveStart"
}

%end (a: bf16[4,2], b: bf16[8,2], c: u32[], d: u32[], e: u32[], /*index=5*/f: u32[]) -> \
bf16[8,2] {
  %a = bf16[4,2]{1,0} parameter(0)
  %b = bf16[8,2]{1,0} parameter(1)
  %gather.1 = bf16[8,2]{1,0} all-gather(%a), channel_id=3, dimensions={0}
  ROOT %call = bf16[8,2]{1,0} custom-call(%a, %gather.1), custom_call_target="Done"
}

%body (t: (s32[], bf16[8,2], s32[])) -> (s32[], bf16[8,2], s32[]) {
  %t = (s32[]{:T(128)}, bf16[8,2]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %x = bf16[8,2]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%t), index=1
  %limit = s32[]{:T(128)} get-tuple-element(%t), index=2
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %y = bf16[8,2]{1,0:T(8,128)(2,1)S(1)} tanh(%x)
  ROOT %out = (s32[]{:T(128)}, bf16[8,2]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) \
tuple(%next, %y, %limit)
}

%test (t: (s32[], bf16[8,2], s32[])) -> pred[] {
  %t = (s32[]{:T(128)}, bf16[8,2]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %limit = s32[]{:T(128)} get-tuple-element(%t), index=2
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (a: bf16[4,2]) -> bf16[8,2] {
  %a = bf16[4,2]{1,0:T(8,128)(2,1)} parameter(0)
  %near-start = (bf16[4,2]{1,0:S(1)}, bf16[4,2]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %near = bf16[4,2]{1,0:T(8,128)(2,1)S(1)} copy-done(%near-start)
  %begun = (bf16[4,2]{1,0}, bf16[8,2]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}, u32[]{:S(2)}, \
/*index=5*/u32[]{:S(2)}) fusion(%near), kind=kCustom, calls=%begin
  %a.1 = bf16[4,2]{1,0} get-tuple-element(%begun), index=0
  %b.1 = bf16[8,2]{1,0} get-tuple-element(%begun), index=1
  %c.1 = u32[]{:S(2)} get-tuple-element(%begun), index=2
  %d.1 = u32[]{:S(2)} get-tuple-element(%begun), index=3
  %e.1 = u32[]{:S(2)} get-tuple-element(%begun), index=4
  %f.1 = u32[]{:S(2)} get-tuple-element(%begun), index=5
  %whole = bf16[8,2]{1,0:S(1)} fusion(%a.1, %b.1, %c.1, %d.1, %e.1, /*index=5*/%f.1), \
kind=kCustom, calls=%end
  %first = s32[]{:T(128)} constant(2)
  %limit = s32[]{:T(128)} constant(7)
  %begin.1 = s32[]{:T(128)} copy(%first)
  %t = (s32[]{:T(128)}, bf16[8,2]{1,0:S(1)}, s32[]{:T(128)}) tuple(%begin.1, %whole, %limit)
  %loop = (s32[]{:T(128)}, bf16[8,2]{1,0:S(1)}, s32[]{:T(128)}) while(%t), \
condition=%test, body=%body
  %y = bf16[8,2]{1,0:S(1)} get-tuple-element(%loop), index=1
  ROOT %far = bf16[8,2]{1,0} copy(%y)
}
"""


def test_a_program_for_a_gpu_is_counted_to_the_last_kernel():
    run = _hlo.read(GPU)
    assert run.always.kernels == 3 * 2 + 1  # two in each turn, and the collective
    assert run.branches.kernels == 2  # the library's and the copy
    assert (run.conditionals, run.open_loops) == (1, 0)
    assert run.always.sent == {"all-gather": 16 * 4 * 4}  # what arrives, not what leaves
    assert not run.branches.sent
    row, index, whole = 16, 4, 128
    slices = (row + index + row) + (row + index + row)  # read, used, written; twice
    # A gather reads its operand and writes what its start lists: operand and result.
    assert run.always.traffic == 3 * slices + whole + (whole + 2 * whole)
    assert run.branches.traffic == 4 * whole
    assert run.worst.kernels == 9


def test_a_program_for_a_tpu_is_counted_to_the_last_kernel():
    run = _hlo.read(TPU)
    # Begin and end of the collective, the copy of the counter, a tanh in each of 7 − 2
    # turns, and the copy at the end; no prefetch, no arithmetic of single numbers.
    assert run.always.kernels == 2 + 1 + (7 - 2) + 1
    assert (run.conditionals, run.open_loops) == (0, 0)
    assert run.always.sent == {"all-gather": 8 * 2 * 2}  # one channel, sent once


def test_a_collective_that_runs_behind_a_loop_is_sent_once():
    """Its kernels in the body are of the same collective, and not one in each turn."""
    middle = TPU[TPU.index("%begin") : TPU.index("%end")].replace("%begin", "%middle")
    spread = TPU.replace("%body (", middle + "%body (", 1)
    spread = spread.replace("tanh(%x)", "fusion(%x), kind=kCustom, calls=%middle")
    run = _hlo.read(spread)
    assert run.always.sent == _hlo.read(TPU).always.sent
    assert run.always.kernels == _hlo.read(TPU).always.kernels


def test_collectives_of_one_channel_are_several():
    """Those that shard_map asks for on CPU all have the first one."""
    sums = """\
%s1 = f32[8,4]{1,0} reduce-scatter(%b), channel_id=1, to_apply=%add
  %s2 = f32[8,4]{1,0} reduce-scatter(%b), channel_id=1, to_apply=%add
  %gather-start ="""
    run = _hlo.read(GPU.replace("%gather-start =", sums, 1))
    assert run.always.sent["reduce-scatter"] == 2 * 128


def test_memory_on_the_chip_is_no_traffic():
    run = _hlo.read(TPU)
    near = _hlo.read(TPU.replace("S(1)", ""))
    assert near.always.traffic - run.always.traffic >= 5 * 2 * 32  # of the loop alone
    assert run.always.kernels == near.always.kernels


def test_loops_whose_turns_do_not_show_count_as_one():
    unknown = TPU.replace(
        "%limit = s32[]{:T(128)} constant(7)", "%limit = s32[] parameter(1)"
    )
    run = _hlo.read(unknown)
    assert run.open_loops == 1
    assert run.always.kernels == _hlo.read(TPU).always.kernels - 4


def test_the_longest_branch_counts_in_each_amount():
    both = GPU.replace(
        "ROOT %a = f32[8,4]{1,0} get-tuple-element(%t), index=0",
        """\
%a = f32[8,4]{1,0} get-tuple-element(%t), index=0
  ROOT %sum = f32[8,4]{1,0} all-reduce(%a), channel_id=2, to_apply=%add""",
    )
    run = _hlo.read(both)
    assert run.branches.kernels == 2
    assert run.branches.sent == {"all-reduce": 128}
    assert run.conditionals == 1


@pytest.mark.parametrize(
    ("dtype", "bytes_"),
    [("pred", 1), ("s4", 0.5), ("bf16", 2), ("f8e4m3fn", 1), ("f32", 4), ("c64", 8)],
)
def test_sizes_of_types(dtype, bytes_):
    text = GPU.replace("f32[", f"{dtype}[")
    line = parse(text)[0]["main"]["a"]
    assert line.results[0].size == 32 * bytes_


def products(a, b):
    """Six products in a loop, one outside, and one in a branch."""

    def turn(x, _):
        return jnp.matmul(x, b, precision="highest"), None

    x, _ = jax.lax.scan(turn, a, length=6)
    y = jnp.einsum("bij,bkj->bik", jnp.stack([a, x]), jnp.stack([x, a]))
    half = lambda: (x.astype(jnp.bfloat16) @ b.astype(jnp.bfloat16)).astype(x.dtype)
    return jax.lax.cond(y[0, 0, 0] > 0, half, lambda: x), y


def test_flops_of_products_by_type_and_precision():
    a, b = jnp.ones((3, 5)), jnp.ones((5, 5))
    run = _hlo.read(jax.jit(products).lower(a, b).compiler_ir("hlo").as_hlo_text())
    assert run.always.flops == {
        "f32 highest": 6 * 2 * 3 * 5 * 5,
        "f32 default": 2 * (2 * 3 * 3 * 5),
    }
    assert run.branches.flops == {"bf16 default": 2 * 3 * 5 * 5}


def test_what_is_measured_of_a_program():
    a, b = jnp.ones((3, 5)), jnp.ones((5, 5))
    found = _hlo.measure(jax.jit(products).lower(a, b))
    assert found["argument_bytes"] == 4 * (3 * 5 + 5 * 5)
    assert found["conditionals"] == 1
    assert found["open_loops"] == 0
    assert found["kernels"] >= 6 + 1
    assert found["branch_kernels"] >= 1
    assert found["flops"]["f32 highest"] == 900
    assert found["compile_seconds"] > 0
    assert found["sent"] == {}


def test_a_search_is_an_open_loop():
    def halve(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: jnp.tanh(x) / 2, x)

    found = _hlo.measure(jax.jit(halve).lower(jnp.ones(5)))
    assert found["open_loops"] == 1


def test_collectives_of_eight_devices():
    mesh = Mesh(np.array(jax.devices("cpu")[:8]), ("x",))
    rows, whole = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
    a = jax.ShapeDtypeStruct((16, 6), jnp.float32, sharding=rows)
    step = jax.jit(lambda a, b: (a.T @ b, a @ b.T), out_shardings=(whole, rows))
    found = _hlo.measure(step.lower(a, a))
    assert found["sent"] == {"all-reduce": 4 * 6 * 6, "all-gather": 4 * 16 * 6}
    assert found["argument_bytes"] == 2 * 4 * 16 * 6 / 8  # of one device
    assert found["flops"] == {"f32 default": 2 * (6 * 6 * 16 + 16 * 16 * 6)}


def row_of(stack, i):
    return jnp.tanh(jax.lax.dynamic_slice_in_dim(stack, i, 1))


def with_row(stack, row, i):
    return jax.lax.dynamic_update_slice_in_dim(stack, jnp.tanh(row)[None], i, 0)


@pytest.mark.parametrize(
    ("function", "shapes", "donate"),
    [
        (lambda a: jnp.tanh(a) * a + 1, [(32, 16)], ()),
        (lambda a, b: jnp.tanh(a @ b) @ b, [(32, 16), (16, 16)], ()),
        (lambda a: jnp.sum(a**2, 0), [(8, 32, 16)], ()),
        (row_of, [(8, 32, 16), ()], ()),
        (with_row, [(8, 32, 16), (32, 16), ()], (0,)),
    ],
    ids=["elementwise", "products", "sum", "slice", "update in place"],
)
def test_traffic_is_that_of_xlas_own_analysis(function, shapes, donate):
    arguments = [jnp.ones(shape, int if shape == () else float) for shape in shapes]
    program = jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
    found = _hlo.read(program.as_text()).always.traffic
    assert found == pytest.approx(program.cost_analysis()["bytes accessed"], rel=0.01)


def test_a_loop_moves_its_bytes_in_every_turn():
    def turns(n):
        step = lambda x, _: (jnp.tanh(x @ x), None)
        run = jax.jit(lambda x: jax.lax.scan(step, x, length=n)[0])
        return _hlo.read(run.lower(jnp.ones((32, 32))).compile().as_text()).always

    three, five, nine = turns(3), turns(5), turns(9)
    assert nine.kernels - five.kernels == 2 * (five.kernels - three.kernels) > 0
    assert nine.traffic - five.traffic == 2 * (five.traffic - three.traffic)
    assert five.traffic - three.traffic >= 2 * 4 * 32 * 32 * 3
