"""Contracts of a study's report: paired differences, means and spreads, and that all of it is made of the raw JSON."""

import json
import pathlib
import statistics

import pytest
from matplotlib.figure import Figure

from endistill_jax.reports.files import json_text
from endistill_jax.studies import report as study
from endistill_jax.studies.report import study_plots
from endistill_jax.studies.results import (
    curve,
    downstream,
    final,
    paired,
    read_raw,
    sites,
    study_markdown,
    study_tables,
    task_metrics,
    trains_on,
    write_raw,
)

PUBLISHED = pathlib.Path(__file__).parents[2] / "docs" / "studies"
LOSS = {"scratch": (6.0, 6.3, 6.9), "taught": (5.5, 5.9, 6.4)}
ROUGE = {"scratch": (10.0, 11.0, 12.0), "taught": (11.0, 13.0, 12.0)}


def evaluation(step, loss):
    probe = {"probe/cross/qk": loss / 10, "probe/cross/vv": loss / 5, "probe/logits": loss}
    return {"step": step, "token_loss": loss, "shuffled_input_gap": 0.1, "token_accuracy": 0.25} | probe


@pytest.fixture
def raw():
    runs = [
        {
            "arm": arm,
            "seed": seed,
            "tokens": 1000,
            "seconds": 10.0 + seed,
            "evaluations": [evaluation(0, 9.0), evaluation(50, losses[seed] + 1), evaluation(100, losses[seed])],
            "downstream": {
                "summary": {"metrics": {"rouge1": ROUGE[arm][seed]}, "step": 5, "tokens": 9, "seconds": 1.0}
            },
        }
        for seed in (2, 0, 1)
        for arm, losses in LOSS.items()
    ]
    arms = {
        "scratch": {"terms": ["lm"], "steps": [100], "flops": 1e12, "parameters": 2000},
        "taught": {"terms": ["cross/qk", "cross/vv"], "steps": [100], "flops": 1e12, "parameters": 2000},
    }
    teacher = {"parameters": 9000, "token_loss": 4.0, "bigram_loss": 5.8}
    return {
        "baseline": "scratch",
        "seeds": [0, 1, 2],
        "arms": arms,
        "eval_spec": {"shards": 1},
        "teacher_metrics": teacher,
        "runs": runs,
    }


def test_figures_are_by_seed_and_differences_are_paired(raw):
    assert final(raw, "taught", "token_loss") == dict(enumerate(LOSS["taught"]))
    assert paired(final(raw, "taught", "token_loss"), final(raw, "scratch", "token_loss")) == pytest.approx(
        [-0.5, -0.4, -0.5]
    )
    assert curve(raw, "scratch", "token_loss")[50] == {0: 7.0, 1: 7.3, 2: 7.9}
    assert paired({0: 1.0, 1: 5.0}, {1: 2.0, 2: 9.0}) == [3.0], "only seeds that both have"
    assert downstream(raw, "taught", "summary", "rouge1") == dict(enumerate(ROUGE["taught"]))


def test_a_site_is_the_mean_of_its_terms(raw):
    assert sites(raw) == ["cross", "logits"] and task_metrics(raw) == [("summary", "rouge1")]
    assert final(raw, "scratch", "probe/cross")[0] == pytest.approx(6.0 * 0.15)
    assert final(raw, "scratch", "probe/logits")[0] == 6.0
    assert trains_on(raw, "taught", "cross") and not trains_on(raw, "taught", "logits")


def test_table_tells_mean_spread_and_paired_differences(raw):
    held_out, tuned, probe = study_tables(raw)
    scratch, taught, teacher, bigram = held_out.rows
    assert taught["token_loss"] == list(LOSS["taught"]) and scratch["token_loss/difference"] is None
    assert (teacher["token_loss"], bigram["token_loss"]) == (4.0, 5.8)
    assert statistics.fmean(tuned.rows[1]["summary/rouge1/difference"]) == pytest.approx(1.0)
    assert probe.rows[0] == {
        "arm": "scratch before training (3 seeds)",
        "cross": pytest.approx([1.35] * 3),
        "logits": [9.0] * 3,
    }
    text = study_markdown(raw)
    assert "have ended" not in text
    # The spread of the differences is that of the pairs: far smaller than that of either arm.
    assert "| taught | 5.933 ± 0.451 | -0.467 ± 0.058 |" in text
    assert "| taught | 12.0 ± 1.00 | +1.000 ± 1.000 |" in text


def test_a_study_in_progress_has_tables_and_plots_of_what_is_there(raw):
    raw["runs"] = [run for run in raw["runs"] if run["seed"] == 2 and run["arm"] == "scratch"]
    held_out, *_ = study_tables(raw)
    assert [row["arm"] for row in held_out.rows] == ["scratch", "teacher", "bigram"]
    assert "1 of 6 runs have ended" in study_markdown(raw)
    assert set(study_plots(raw)) == {"held_out_loss.png", "downstream.png", "divergence.png"}
    raw["runs"][0]["arm"] = "taught"  # the baseline has not ended yet
    held_out, *_ = study_tables(raw)
    assert held_out.rows[0]["token_loss/difference"] == []
    assert set(study_plots(raw)) == {"held_out_loss.png", "downstream.png", "divergence.png"}
    raw["runs"] = []
    assert "0 of 6 runs have ended" in study_markdown(raw) and set(study_plots(raw)) == {"held_out_loss.png"}


def test_the_legend_says_that_a_chains_line_is_of_its_last_stage(raw, monkeypatch):
    raw["arms"]["taught"]["steps"] = [50, 100]
    labels, legend = [], Figure.legend

    def noting(figure, handles, named, **settings):
        labels.append(named)
        return legend(figure, handles, named, **settings)

    monkeypatch.setattr(Figure, "legend", noting)
    study_plots(raw)
    assert labels == [["scratch", "taught (last stage)"]] * 2


def test_a_study_without_tasks_and_probe_has_neither_tables_nor_plots_of_them(raw):
    for run in raw["runs"]:
        run["downstream"] = {}
        run["evaluations"] = [{"step": 100} | {x: 1.0 for x in ("token_loss", "shuffled_input_gap", "token_accuracy")}]
    assert len(study_tables(raw)) == 1 and set(study_plots(raw)) == {"held_out_loss.png"}


def test_everything_is_made_anew_from_the_raw_file(raw, tmp_path, capsys):
    write_raw(tmp_path, raw)
    assert json.loads((tmp_path / "study.json").read_text()) == json.loads(json_text(raw))
    study.write_report(tmp_path, raw)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(before) == {"study.json", "study.md", "held_out_loss.png", "downstream.png", "divergence.png"}
    for name in set(before) - {"study.json"}:
        (tmp_path / name).unlink()
    assert study.main([str(tmp_path)]) == 0
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert study.main([]) == 2 and "usage" in capsys.readouterr().err
    assert study.main([str(tmp_path / "nowhere")]) == 2
    assert "study.json, the record of a study, cannot be read (FileNotFoundError: " in capsys.readouterr().err
    (tmp_path / "study.json").write_text("[]")
    assert study.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("study.json is no record of a study; move it away\n")
    for name in ("held_out_loss", "downstream", "divergence"):
        assert f"]({name}.png)" in before["study.md"].decode() and len(before[f"{name}.png"]) < 200_000


def test_a_file_of_an_earlier_version_is_read_under_present_names(raw, tmp_path):
    renamed = {"eval_spec": "judged_by", "teacher_metrics": "teacher_figures"}
    (tmp_path / "study.json").write_text(json_text({renamed.get(name, name): value for name, value in raw.items()}))
    assert read_raw(tmp_path) == json.loads(json_text(raw))


@pytest.mark.parametrize("record", sorted(PUBLISHED.glob("*/study.json")), ids=lambda record: record.parent.name)
def test_published_records_of_every_age_are_reported(record):
    assert "| teacher |" in study_markdown(read_raw(record.parent))


def test_a_loss_that_is_no_number_is_read_back(raw):
    raw["runs"][0]["evaluations"][-1]["token_loss"] = float("nan")
    again = json.loads(json_text(raw))
    assert str(final(again, "scratch", "token_loss")[2]) == "nan"
    text = study_markdown(again)
    assert "| scratch | nan ± nan | - |" in text and "| taught | 5.933 ± 0.451 | nan ± nan |" in text


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["one", "all"])
def test_figures_that_are_no_numbers_prevent_no_table_and_no_plot(raw, number, place):
    for run in raw["runs"][: 1 if place == "one" else None]:
        for evaluation in run["evaluations"]:
            evaluation |= {name: number for name in evaluation if name != "step"}
        run["downstream"]["summary"]["metrics"]["rouge1"] = number
    raw["teacher_metrics"]["token_loss"] = number
    again = json.loads(json_text(raw))
    assert len(study_tables(again)) == 3 and "nan ± nan" in study_markdown(again)
    assert set(study_plots(again)) == {"held_out_loss.png", "downstream.png", "divergence.png"}
