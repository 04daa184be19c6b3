"""Names of slices: what users write is what they get, and what cannot be is told with what can."""

import importlib.util
import math

import pytest

from endistill_jax.core.errors import UserError
from endistill_jax.planning.topologies import SHAPES, environment, known_names, parse_topologies, parse_topology


@pytest.mark.parametrize(
    ("given", "name", "chips", "cloud_name"),
    [
        ("v5e:4x4", "v5e:4x4", 16, "v5litepod-16"),
        ("v5e-64", "v5e:8x8", 64, "v5litepod-64"),
        ("v5litepod-64", "v5e:8x8", 64, "v5litepod-64"),
        ("V5LitePod-8", "v5e:2x4", 8, "v5litepod-8"),
        ("v5e-1", "v5e:1x1", 1, "v5litepod-1"),
        ("v6e-16", "v6e:4x4", 16, "v6e-16"),
        ("v4-64", "v4:2x4x4", 32, "v4-64"),
        ("v4-8", "v4:2x2x1", 4, "v4-8"),
        ("v5p-128", "v5p:4x4x4", 64, "v5p-128"),
        ("2*v5e:4x4", "2*v5e:4x4", 32, "v5litepod-16"),
        ("4*v4-64", "4*v4:2x4x4", 128, "v4-64"),
    ],
)
def test_a_tpu_slice_is_named_by_shape_or_by_size(given, name, chips, cloud_name):
    topology = parse_topology(given)
    assert (topology.name, topology.chips, topology.cloud_name) == (name, chips, cloud_name)
    assert environment(topology)["TPU_ACCELERATOR_TYPE"] == cloud_name
    assert not topology.is_proxy


@pytest.mark.parametrize("name", ["cpu:8", "gpu:8", "h100:8", "h200:1"])
def test_a_host_is_compiled_for_by_proxy_on_as_many_devices(name):
    topology = parse_topology(name)
    assert topology.name == name and topology.is_proxy
    assert environment(topology)["XLA_FLAGS"].endswith(f"={topology.chips}")


def test_every_name_that_is_listed_as_known_parses_to_itself():
    for kind, shapes in SHAPES.items():
        for shape in shapes:
            topology = parse_topology(f"{kind}:{shape}")
            assert topology.name == f"{kind}:{shape}"
            assert topology.chips == math.prod(map(int, shape.split("x")))
            assert parse_topology(topology.cloud_name) == topology
            assert f"{kind}:{shape}" in known_names()


def test_a_list_has_commas():
    assert [topology.name for topology in parse_topologies("v5e-16, v6e:2x4")] == ["v5e:4x4", "v6e:2x4"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("v5e:3x3", "v5e:4x4 (v5e-16)"),
        ("v5e-12", "v5e:2x4 (v5e-8)"),
        ("v4-4", "v4:2x2x1 (v4-8)"),
        ("v5p:4x4", "v5p:4x4x4"),
        ("v7x:4x4", "v5e:4x4"),
        ("v5", "v5e:4x4"),
        ("0*v5e:4x4", "v5e:4x4"),
        ("2*cpu:8", "one host, such as cpu:8"),
        ("h100:8x2", "one host, such as h100:8"),
        ("cpu:0", "one host, such as cpu:8"),
        ("", "v5e:4x4"),
    ],
)
def test_a_name_that_is_none_tells_of_those_that_are(given, told):
    with pytest.raises(UserError) as error:
        parse_topologies(given)
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (the extra `plan`)")
def test_libtpu_knows_every_listed_name_and_has_one_device_a_chip(run_python):
    program = """
import math
from endistill_jax.planning.topologies import SHAPES, devices, parse_topology
for name in [f"{kind}:{shape}" for kind, shapes in SHAPES.items() for shape in shapes] + ["2*v5e:4x4", "2*v4-64"]:
    topology = parse_topology(name)
    found = devices(topology)
    assert len(found) == topology.chips, (name, len(found))
    assert len({getattr(device, "slice_index", 0) for device in found}) == topology.slices, name
"""
    run_python(program, environment(parse_topology("v5e:4x4")))
