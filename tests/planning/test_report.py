"""Reports: every figure of a plan is told, in the unit that it says, and what failed is a row."""

import json

import pytest

from endistill_jax.planning.report import describe_plan, plans_table, write_plans

GIB = 2**30


def test_a_plan_tells_memory_traffic_time_and_cost(make_plan):
    text = describe_plan(make_plan("2*v5e:4x4", price=2.0, memory=4 * GIB))
    for told in (
        "2*v5e:4x4: 32 chips, fits",
        "1 x 32 x 1",
        "0.25 examples a chip, 8 in all, of 16 + 8 positions",
        "5.0 k parameters",
        "4.00 of 16",
        "temporaries 4.00",
        "2.000e+12" if "2.000e+12" in describe_plan(make_plan()) else "2e+12",
        "all-gather | 3 | 8.000 | 7.000",
        "all-reduce, between slices | 1 | 1.000 | 1.000",
        "at 2 a chip-hour",
        "60 s, 3.0 GiB",
        "Assumed: computing at 60% to 30%",
        "Google Cloud TPU documentation",
    ):
        assert told in text


def test_memory_is_arguments_temporaries_and_outputs_without_what_is_shared(make_plan):
    plan = make_plan()
    parts = {"arguments": 1000, "temporaries": 500, "outputs": 300, "aliases": 250, "program": 20}
    object.__setattr__(plan, "result", plan.result | {"memory": parts})
    assert plan.memory == 1000 + 500 + 300 - 250 + 20
    # What the step does not read lies there all the same.
    object.__setattr__(plan, "result", plan.result | {"held": {"teacher": 5000}})
    assert plan.memory == 5000 + 500 + 300 - 250 + 20


@pytest.mark.parametrize(("memory", "status"), [(15 * GIB, "fits"), (17 * GIB, "too big")])
def test_a_step_fits_if_the_chip_has_its_memory(make_plan, memory, status):
    assert make_plan("v5e:4x4", memory=memory).status == status


def test_a_host_is_marked_as_a_proxy(make_plan):
    text = describe_plan(make_plan("cpu:8"))
    assert "cpu:8: 8 chips, proxy" in text and "temporaries are a proxy only" in text
    assert "step, estimated" not in text  # nothing is known of such a chip


def test_what_does_not_fit_is_a_row_with_the_compilers_reason(make_plan):
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory. Used 20.1G of 15.75G hbm. Exceeded"
    )
    plans = [make_plan(), make_plan(result={"status": "too big", "reason": message, "host_memory": 1})]
    table = plans_table(plans)
    assert len([line for line in table.splitlines() if line.startswith("| v5e:4x4")]) == 2
    assert "Used 20.1G of 15.75G hbm" in table and "too big" in table
    assert "too big (Used 20.1G of 15.75G hbm)" in describe_plan(plans[1])


def test_files_hold_the_text_and_all_figures(make_plan, tmp_path):
    plan = make_plan(price=1.0)
    write_plans(tmp_path, "plan", [plan], "text\n")
    [row] = json.loads((tmp_path / "plan.json").read_text())
    assert (tmp_path / "plan.md").read_text() == "text\n"
    assert row["topology"] == "v5e:4x4" and row["memory_per_chip"] == plan.memory
    assert row["run"]["cost"]["least"] == plan.run.cost.least
    assert row["found"]["collectives"] == plan.result["collectives"]
    assert row["asked"]["student"]["d_model"] == 16
