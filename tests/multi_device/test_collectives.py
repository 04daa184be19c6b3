"""Traffic read off compiled programs on eight devices, against what can be counted by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from endistill_jax.planning.costs import Traffic, matmul_flops, read_collectives
from endistill_jax.planning.hlo import parse_program
from endistill_jax.sharding import make_mesh

ONE_SLICE = [0] * 8
TWO_SLICES = [0] * 4 + [1] * 4
LENGTH = 16  # float32 numbers that each device holds
BYTES = 4 * LENGTH
SPLIT = PartitionSpec(("data", "fsdp"))


def compiled(body, out_spec=SPLIT):
    """The program of `body` on each device's 16 numbers, on a mesh of 2 x 4."""
    mesh = make_mesh(2, 4, 1)
    mapped = jax.shard_map(body, mesh=mesh, in_specs=SPLIT, out_specs=out_spec, check_vma=False)
    numbers = jax.ShapeDtypeStruct((8 * LENGTH,), jnp.float32, sharding=NamedSharding(mesh, SPLIT))
    return parse_program(jax.jit(mapped).lower(numbers).compile().as_text())


def traffic(body, slice_of=ONE_SLICE, out_spec=SPLIT):
    return read_collectives(compiled(body, out_spec), slice_of)


def test_a_sum_for_all_sends_each_number_twice_but_for_its_own_part():
    found = traffic(lambda x: jax.lax.psum(x, ("data", "fsdp")), out_spec=PartitionSpec())
    assert found == [Traffic(kind="all-reduce", crosses_slices=False, count=1, payload=BYTES, sent=2 * BYTES * 7 // 8)]


def test_a_gather_counts_the_whole_and_sends_the_other_parts():
    found = traffic(lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), out_spec=PartitionSpec("data"))
    assert found == [Traffic(kind="all-gather", crosses_slices=False, count=1, payload=4 * BYTES, sent=3 * BYTES)]


def test_a_scattered_sum_counts_what_is_summed():
    found = traffic(lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True))
    assert found == [Traffic(kind="reduce-scatter", crosses_slices=False, count=1, payload=BYTES, sent=BYTES * 3 // 4)]


def test_a_permutation_sends_what_it_has():
    shift = functools.partial(jax.lax.ppermute, axis_name="fsdp", perm=[(i, (i + 1) % 4) for i in range(4)])
    found = traffic(shift)
    assert found == [Traffic(kind="collective-permute", crosses_slices=False, count=1, payload=BYTES, sent=BYTES)]


def test_loops_within_loops_count_every_turn():
    def inner(x, _):
        return x + jnp.sum(jax.lax.all_gather(x, "fsdp"), axis=0), None

    def outer(x, _):
        x, _ = jax.lax.scan(inner, x, None, length=3)
        return jnp.sin(jax.lax.psum(x, "data")), None

    found = {each.kind: each for each in traffic(lambda x: jax.lax.scan(outer, x, None, length=5)[0])}
    assert found["all-gather"].count == 15
    assert found["all-gather"].sent == 15 * 3 * BYTES
    assert found["all-reduce"].count == 5
    assert found["all-reduce"].sent == 5 * BYTES  # 2 (n - 1) / n with n = 2


@pytest.mark.parametrize(("axis", "crosses"), [("data", True), ("fsdp", False)])
def test_traffic_between_slices_is_told_apart(axis, crosses):
    """Slices lie along `data`: the first four devices are one, the others another."""
    found = traffic(lambda x: jax.lax.psum(x, axis), TWO_SLICES)
    assert [each.crosses_slices for each in found] == [crosses]


def test_one_device_alone_exchanges_nothing():
    assert traffic(lambda x: x * 2) == []


def test_products_count_for_one_device_and_every_turn():
    weights = jnp.ones((LENGTH, LENGTH))

    def turn(x, _):
        return jnp.tanh(x @ weights), None

    program = compiled(lambda x: jax.lax.scan(turn, x[None], None, length=7)[0][0])
    assert matmul_flops(program) == 7 * 2 * LENGTH * LENGTH
