"""Inference: in order, once each, and after a break as if there had been none."""

import gzip
import json

import pytest

from endistill_jax.checkpoints.models import TrainedModel
from endistill_jax.core.errors import UserError
from endistill_jax.evaluation.predictor import Predictor
from endistill_jax.jobs import Reading, infer
from endistill_jax.models.generation.generation import Decoding

TEXTS = [f"{'text ' * (number % 4)}number {number}" for number in range(40)]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, distilled):
    """Forty texts of several lengths, three of whose lines are bad; sixteen lines at a time."""
    file = tmp_path_factory.mktemp("inputs") / "texts.jsonl"
    lines = [json.dumps({"inputs": text}) for text in TEXTS]
    lines[3], lines[20], lines[22] = "no json", json.dumps({"text": "no inputs"}), json.dumps({"inputs": "half \ud83d"})
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {
        "model": str(distilled),
        "input_file": str(file),
        "decoding": Decoding(max_length=6, strategy="sample"),
        "reading": Reading(inputs_length=20),
        "batch_size": 2,
        "vocabulary_file": "bytes",
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory, arguments):
    """The output of a run that was not broken off."""
    file = tmp_path_factory.mktemp("whole") / "out.jsonl"
    assert infer(output_file=str(file), **arguments) == 37
    return file


def records(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_every_good_line_has_its_answer_in_order(whole, capsys, tmp_path, arguments):
    found = records(whole)
    assert [record["line"] for record in found] == [number for number in range(1, 41) if number not in (4, 21, 23)]
    assert all(record["inputs"] == TEXTS[record["line"] - 1] for record in found)
    assert [record.get("cut", False) for record in found] == [len(record["inputs"]) > 19 for record in found]
    infer(output_file=str(tmp_path / "out.jsonl"), **arguments)
    told = capsys.readouterr()
    assert "line 4 is not JSON" in told.err and "line 21 has no string in field 'inputs'" in told.err
    assert "line 23 has \\ud83d, half of a surrogate pair, which is no character" in told.err
    cut = sum("cut" in record for record in found)
    assert cut and f"37 lines written, 3 bad lines skipped, {cut} inputs cut to 20 tokens" in told.out


@pytest.mark.parametrize("kept", [0, 1, 10, 15, 29, 37])
def test_a_broken_run_goes_on_and_writes_no_line_twice(tmp_path, whole, arguments, kept, capsys):
    file = tmp_path / "out.jsonl"
    lines = whole.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:kept]) + (lines[kept][:9] if kept < 37 else b""))
    (tmp_path / "out.jsonl.run.json").write_bytes(whole.with_name("out.jsonl.run.json").read_bytes())
    assert infer(output_file=str(file), **arguments) == 37
    assert file.read_bytes() == whole.read_bytes()
    assert "37 lines written, 3 bad lines skipped" in capsys.readouterr().out


def test_a_run_that_fails_midway_leaves_whole_lines_to_go_on_from(tmp_path, whole, arguments, monkeypatch):
    file, generate, calls = tmp_path / "out.jsonl", Predictor.generate, []

    def fails_the_third_time(*given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*given)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Predictor, "generate", fails_the_third_time)
        infer(output_file=str(file), **arguments)
    assert len(records(file)) == 29
    infer(output_file=str(file), **arguments)
    assert file.read_bytes() == whole.read_bytes()


def test_another_model_input_or_setting_is_refused(tmp_path, whole, arguments, teacher):
    before = whole.read_bytes()

    def refused(match, **changed):
        with pytest.raises(UserError, match=match):
            infer(output_file=str(whole), **arguments | changed)
        assert whole.read_bytes() == before

    refused("model is .* there and .* here", model=teacher)
    refused(r"decoding\.max_length is 6 there and 5 here", decoding=Decoding(max_length=5, strategy="sample"))
    refused("seed is 0 there and 1 here", seed=1)
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"inputs": "another text"}) + "\n")
    refused(r"input\.lines is 40 there and 1 here", input_file=str(other))


def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_read(tmp_path, whole, arguments, monkeypatch):
    monkeypatch.setattr(TrainedModel, "load", None)
    stranger = tmp_path / "stranger.jsonl"
    stranger.write_text("notes\n")
    for match, output, changed in (
        ("is there already, and not from this job", stranger, {}),
        ("seed is 0 there and 1 here", whole, {"seed": 1}),
        ("tmp.* is a folder; give a file in it", tmp_path, {}),
        ("gs://bucket/out.jsonl is not local; give a local file", "gs://bucket/out.jsonl", {}),
    ):
        with pytest.raises(UserError, match=match):
            infer(output_file=str(output), **arguments | changed)
    assert list(tmp_path.iterdir()) == [stranger]


def test_a_bucket_is_no_place_for_the_output_also_in_a_dry_run(arguments):
    with pytest.raises(UserError, match="gs://bucket/out.jsonl is not local"):
        infer(output_file="gs://bucket/out.jsonl", **arguments, dry_run=True)


def test_text_and_gzip_are_read_alike(tmp_path, arguments, whole):
    text, packed = tmp_path / "texts.txt", tmp_path / "texts.txt.gz"
    content = ("\n".join(TEXTS) + "\n").encode()
    text.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    for number, file in enumerate((text, packed)):
        assert infer(output_file=str(tmp_path / f"{number}.jsonl"), **arguments | {"input_file": str(file)}) == 40
    assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "1.jsonl").read_bytes()
    # A row is drawn by its number: what else is in its batch does not matter.
    of_line = {record["line"]: record["prediction"] for record in records(tmp_path / "0.jsonl")}
    assert all(of_line[record["line"]] == record["prediction"] for record in records(whole))
    packed.write_bytes(gzip.compress(content)[:-20])
    with pytest.raises(UserError, match="texts.txt.gz cannot be read to its end"):
        infer(output_file=str(tmp_path / "2.jsonl"), **arguments | {"input_file": str(packed)})


def test_bad_lines_and_long_inputs_are_fatal_if_so_wished(tmp_path, arguments):
    output = {"output_file": str(tmp_path / "bad.jsonl")}
    with pytest.raises(UserError, match=r"texts.jsonl line 4 is not JSON.*skip such lines with Reading.bad_lines"):
        infer(**arguments | output | {"reading": Reading(inputs_length=20, bad_lines="fail")})
    output = {"output_file": str(tmp_path / "long.jsonl")}
    with pytest.raises(UserError, match="line 2 has 14 tokens with its end, and inputs_length is 12"):
        infer(**arguments | output | {"reading": Reading(inputs_length=12, long_inputs="fail")})


def test_mistakes_are_told_before_anything_is_written(tmp_path, arguments):
    for match, changed in (
        ("there is no file .*nowhere", {"input_file": str(tmp_path / "nowhere.txt")}),
        ("no model at", {"model": str(tmp_path / "nowhere")}),
        ("no vocabulary is stored with", {"vocabulary_file": None}),
        ("trained with another vocabulary", {"extra_ids": 50}),
    ):
        with pytest.raises(UserError, match=match):
            infer(output_file=str(tmp_path / "out" / "out.jsonl"), **arguments | changed)
    with pytest.raises(UserError, match="Reading.bad_lines is 'ignore'; choose one of skip, fail"):
        Reading(bad_lines="ignore")
    assert not list(tmp_path.iterdir())
