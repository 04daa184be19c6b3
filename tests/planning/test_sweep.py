"""Sweeps: what is tried, in which order, and what is not tried because it cannot fit."""

import pytest

from endistill_jax.core.errors import UserError
from endistill_jax.jobs.plan import run_sweep, usual_meshes
from endistill_jax.planning.options import Sweep, parse_sweep
from endistill_jax.planning.report import rank
from endistill_jax.planning.topologies import parse_topology


@pytest.fixture
def tried(make_request, make_plan):
    """Runs a sweep whose steps fit if batch and what is kept of a layer are small enough; returns what was tried."""

    def run(sweep, most, topology="v5e:4x4", **fields):
        seen = []
        kept = {"full": 1, "dots": 2, "none": 4}

        def plan(request):
            seen.append((request.mesh, request.teacher_sharding, request.student.remat, request.batch_per_chip))
            fits = request.batch_per_chip * kept[request.student.remat] <= most
            result = None if fits else {"status": "too big", "reason": "RESOURCE_EXHAUSTED"}
            settings = {name: getattr(request, name) for name in ("mesh", "student", "lengths", "teacher_sharding")}
            return make_plan(topology, result=result, **settings)

        plans = list(run_sweep(sweep, make_request(topology, **fields), plan))
        return seen, plans

    return run


def test_nothing_that_cannot_fit_any_more_is_tried(tried):
    seen, plans = tried(Sweep(batch=(64, 32, 16), remat=()), most=32)
    kind = ((-1, 1, 1), "sharded")
    assert seen == [
        (*kind, "full", 64),  # too big, so also with what keeps more
        (*kind, "full", 32),
        (*kind, "dots", 32),
        (*kind, "dots", 16),
        (*kind, "none", 16),
    ]
    assert [plan.fits for plan in plans] == [False, True, False, True, False]


def test_an_axis_that_is_not_named_stays_as_configured(tried):
    seen, _ = tried(Sweep(batch=(8,)), most=64, mesh=(1, 16, 1), teacher_sharding="replicated")
    assert seen == [((1, 16, 1), "replicated", "none", 8)]


def test_a_teacher_that_nothing_splits_is_placed_once(tried):
    seen, _ = tried(Sweep(mesh=((16, 1, 1), (1, 16, 1)), teacher=()), most=2**20)
    assert [(mesh, placement) for mesh, placement, *_ in seen] == [
        ((16, 1, 1), "sharded"),
        ((1, 16, 1), "sharded"),
        ((1, 16, 1), "replicated"),
    ]


@pytest.mark.parametrize("name", ["v5e:4x4", "v5e:1x1", "2*v5e:4x4", "h100:8"])
def test_usual_meshes_cover_the_chips_and_keep_slices_along_data(name):
    topology = parse_topology(name)
    for data, fsdp, tensor in usual_meshes(topology):
        assert data * fsdp * tensor == topology.chips and data % topology.slices == 0
    assert len(set(usual_meshes(topology))) == len(usual_meshes(topology))


def test_words_name_axes_and_values():
    assert parse_sweep([""]) == Sweep(mesh=(), batch=(), remat=(), teacher=())
    assert parse_sweep(["batch=16,32", "mesh=1x16x1,4x4x1"]) == Sweep(batch=(16, 32), mesh=((1, 16, 1), (4, 4, 1)))
    assert parse_sweep(["", "remat=dots"]) == Sweep(mesh=(), batch=(), remat=("dots",), teacher=())


@pytest.mark.parametrize("word", ["size=3", "batch=x", "batch=0", "mesh=4x4", "remat=half", "teacher=gone"])
def test_words_that_mean_nothing_are_refused(word):
    with pytest.raises(UserError, match="--sweep"):
        parse_sweep([word])


def test_what_fits_is_ranked_by_tokens_a_day_and_the_rest_comes_last(make_plan):
    slow = make_plan("v5e:4x4")
    fast = make_plan("v6e:4x4")
    crashed = make_plan(result={"status": "crashed", "reason": "signal 11"})
    assert rank([crashed, slow, fast]) == [fast, slow, crashed]
