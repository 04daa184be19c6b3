"""Reading compiled programs: loops as TPU's compiler writes them, which notes no turns; what is in fusions."""

import jax
import jax.numpy as jnp
import pytest

from endistill_jax.planning.costs import matmul_flops, read_collectives, replica_groups
from endistill_jax.planning.hlo import Array, parse_arrays, parse_program

# A loop that the compiler unrolled once: its counter grows by two. The condition is a fusion, as it may be.
UNROLLED = """HloModule jit_f, is_scheduled=true

%compared (param_0.1: s32[], param_1.1: s32[]) -> pred[] {
  %param_0.1 = s32[]{:T(128)} parameter(0)
  %param_1.1 = s32[]{:T(128)} parameter(1)
  ROOT %compare.1 = pred[]{:T(512)} compare(%param_0.1, %param_1.1), direction=LT
}

%condition (param.1: (f32[4,8], s32[])) -> pred[] {
  %constant.8 = s32[]{:T(128)} constant(8)
  %param.1 = (f32[4,8]{1,0:T(4,128)}, s32[]{:T(128)}) parameter(0)
  %counter.1 = s32[]{:T(128)} get-tuple-element(%param.1), index=1
  ROOT %fusion.1 = pred[]{:T(512)} fusion(%counter.1, %constant.8), kind=kLoop, calls=%compared
}

%body (param.2: (f32[4,8], s32[])) -> (f32[4,8], s32[]) {
  %param.2 = (f32[4,8]{1,0:T(4,128)}, /*index=1*/s32[]{:T(128)}) parameter(0)
  %x.1 = f32[4,8]{1,0:T(4,128)} get-tuple-element(%param.2), index=0
  %all-reduce.1 = f32[4,8]{1,0:T(4,128)} all-reduce(%x.1), channel_id=1, PAIRS, to_apply=%add.1
  %all-reduce.2 = f32[4,8]{1,0:T(4,128)} all-reduce(%all-reduce.1), channel_id=2, PAIRS, to_apply=%add.1
  %counter.2 = s32[]{:T(128)} get-tuple-element(%param.2), index=1
  %constant.2 = s32[]{:T(128)} constant(2)
  %add.2 = s32[]{:T(128)} add(%counter.2, %constant.2)
  ROOT %tuple.1 = (f32[4,8]{1,0:T(4,128)}, s32[]{:T(128)}) tuple(%all-reduce.2, %add.2)
}

%add.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0:T(4,128)} parameter(0)
  %constant.0 = s32[]{:T(128)} constant(BEGIN)
  %tuple.2 = (f32[4,8]{1,0:T(4,128)}, s32[]{:T(128)}) tuple(%p, %constant.0)
  %while.1 = (f32[4,8]{1,0:T(4,128)}, s32[]{:T(128)}) while(%tuple.2), condition=%condition, body=%bodyNOTED
  ROOT %result = f32[4,8]{1,0:T(4,128)} get-tuple-element(%while.1), index=0
}
"""

# One gather that is worked on during two fusions: named where it starts, in between, and where it ends.
SPREAD = """HloModule jit_f, is_scheduled=true

%starting (param_0.1: bf16[2,8]) -> (bf16[2,8], bf16[8,8], u32[]) {
  %param_0.1 = bf16[2,8]{1,0} parameter(0)
  %all-gather.1 = bf16[8,8]{1,0} all-gather(%param_0.1), channel_id=5, GROUPS, dimensions={0}
  ROOT %custom-call.1 = (bf16[2,8]{1,0}, bf16[8,8]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), TARGET
}

%between (param_0.2: bf16[2,8]) -> bf16[8,8] {
  %param_0.2 = bf16[2,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[8,8]{1,0} all-gather(%param_0.2), channel_id=5, GROUPS, dimensions={0}
}

ENTRY %main (p: bf16[2,8]) -> bf16[8,8] {
  %p = bf16[2,8]{1,0} parameter(0)
  %fusion.1 = (bf16[2,8]{1,0}, bf16[8,8]{1,0}, u32[]{:S(2)}) fusion(%p), kind=kCustom, calls=%starting
  %fusion.2 = bf16[8,8]{1,0} fusion(%p), kind=kCustom, calls=%between
  %all-gather.3 = bf16[8,8]{1,0} all-gather(%p), channel_id=6, GROUPS, dimensions={0}
  ROOT %fusion.3 = bf16[8,8]{1,0} fusion(%p), kind=kCustom, calls=%between
}
"""

LONG = {
    "PAIRS": "replica_groups={{0,1},{2,3}}",
    "GROUPS": "replica_groups=mesh['a'=4,'b'=1] {'a'}",
    "TARGET": 'custom_call_target="AsyncCollectiveStart"',
}


def read(text, **replaced):
    for short, written in {**LONG, **replaced}.items():
        text = text.replace(short, written)
    return parse_program(text)


@pytest.mark.parametrize(
    ("begin", "noted", "turns"),
    [("0", "", 4), ("2", "", 3), ("0", ', backend_config={"known_trip_count":{"n":"9"}}', 9)],
)
def test_turns_come_from_what_is_noted_else_from_begin_bound_and_step(begin, noted, turns):
    program = read(UNROLLED, BEGIN=begin, NOTED=noted)
    [found] = read_collectives(program, [0] * 4)
    assert (found.count, found.payload) == (2 * turns, 2 * turns * 4 * 4 * 8)


def test_a_loop_that_does_not_tell_its_turns_is_told():
    program = read(UNROLLED.replace("direction=LT", "direction=NE"), BEGIN="0", NOTED="")
    assert program.uncounted_loops() == 1
    assert [found.count for found in read_collectives(program, [0] * 4)] == [2]
    assert read(UNROLLED, BEGIN="0", NOTED="").uncounted_loops() == 0


def test_a_collective_that_is_spread_over_fusions_counts_once():
    [found] = read_collectives(read(SPREAD), [0] * 4)
    assert (found.kind, found.count, found.payload) == ("all-gather", 2, 2 * 2 * 8 * 8)


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", [[3, 1], [2, 0]]),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
    ],
)
def test_groups_are_read_in_every_form(written, groups):
    instruction = read(SPREAD, GROUPS=written).computations["main"]["all-gather.3"]
    assert replica_groups(instruction, 4) == groups


def test_sizes_follow_from_types():
    assert parse_arrays("(f32[2,3]{1,0:T(8,128)}, /*index=1*/s32[], pred[5])") == (
        Array(kind="f32", shape=(2, 3)),
        Array(kind="s32", shape=()),
        Array(kind="pred", shape=(5,)),
    )
    sizes = {"bf16[3,4]": 24, "f32[]": 4, "s4[6]": 3, "f8e4m3fn[7]": 7, "u8[2,2]": 4, "pred[9]": 9, "token[]": 0}
    assert {text: parse_arrays(text)[0].bytes for text in sizes} == sizes


def test_a_loop_of_jax_runs_as_often_as_its_scan_is_long():
    def turn(x, weight):
        return jnp.tanh(x @ weight), None

    weights, x = jax.ShapeDtypeStruct((6, 8, 8), jnp.float32), jax.ShapeDtypeStruct((4, 8), jnp.float32)
    compiled = jax.jit(lambda x, weights: jax.lax.scan(turn, x, weights)[0]).lower(x, weights).compile()
    assert matmul_flops(parse_program(compiled.as_text())) == 6 * 2 * 4 * 8 * 8


@pytest.mark.parametrize(
    ("attributes", "shapes", "flops"),
    [
        # A product of [16, 2 x 3] and [2 x 3, 5], its contraction in two pieces.
        ("window={size=2}, dim_labels=b0f_0io->bf0", ("16,2,3", "2,3,5", "16,5,1"), 2 * 16 * 6 * 5),
        # A batch of four products as a convolution whose kernel meets one position each, spread out by dilation.
        (
            "window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
            ("4,8,3", "4,3,5", "4,8,5"),
            4 * 2 * 8 * 3 * 5,
        ),
        # A window that hangs over the edge: of 3 x 3 pairs two do not exist.
        ("window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", ("1,3,1", "3,1,1", "1,3,1"), 2 * 7),
    ],
)
def test_a_convolution_counts_the_pairs_that_exist(attributes, shapes, flops):
    left, right, output = shapes
    text = f"""HloModule jit_f

ENTRY %main (p: f32[{left}], q: f32[{right}]) -> f32[{output}] {{
  %p = f32[{left}] parameter(0)
  %q = f32[{right}] parameter(1)
  ROOT %convolution.1 = f32[{output}] convolution(%p, %q), {attributes}
}}
"""
    assert matmul_flops(parse_program(text)) == flops


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        parse_program("HloModule nothing")
