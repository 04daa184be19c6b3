"""The user's own files: what is a document, and mistakes told with file and line."""

import gzip
import json

import pytest

from endistill_jax.core.errors import UserError
from endistill_jax.data.input_lines import json_text
from endistill_jax.data.pipeline import make_iterator
from endistill_jax.data.text_files import TextFilesSource, matching_files


def _texts(folder, **settings):
    source = TextFilesSource(f"{folder}/*", held_out=0.0, **settings)
    return [example["text"].decode() for example in source.get_dataset("train", shuffle=False).as_numpy_iterator()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "a.txt").write_text("one\ntwo\n\nthree\n  \nfour", encoding="utf-8")
    (folder / "c.jsonl").write_text('{"text": "seven\\nß", "body": "7"}\n\n{"text": " eight ", "body": "8"}\n')
    with gzip.open(folder / "b.txt.gz", "wt") as file:
        file.write("five\nsix\n")
    with gzip.open(folder / "d.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "nine", "body": "9"}))
    return folder


def test_a_line_is_a_document(folder):
    assert _texts(folder) == ["one", "two", "three", "four", "five", "six", "seven\nß", "eight", "nine"]


def test_an_empty_line_ends_a_document_if_asked(folder):
    expected = ["one\ntwo", "three", "four", "five\nsix", "seven\nß", "eight", "nine"]
    assert _texts(folder, documents="blank_line") == expected


def test_the_json_field_can_be_chosen(folder):
    assert _texts(folder, field="body")[-3:] == ["7", "8", "9"]


def test_globs_join_and_repeat_no_file(folder):
    found = matching_files([f"{folder}/*.txt", f"{folder}/a.*"])
    assert found == [f"{folder}/a.txt"]


def test_validation_files_of_their_own(folder):
    source = TextFilesSource(f"{folder}/a.txt", f"{folder}/b.txt.gz")
    texts = [example["text"].decode() for example in source.get_dataset("validation").as_numpy_iterator()]
    assert sorted(texts) == ["five", "six"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": "/nowhere/*.txt"}, "no file matches '/nowhere/"),
        ({"train": "*", "documents": "page"}, "documents is 'page'"),
        ({"train": "*", "held_out": 1.5}, "held_out is 1.5"),
    ],
)
def test_mistakes_in_settings_are_told_before_reading(settings, message):
    with pytest.raises(UserError, match=message):
        TextFilesSource(**settings)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text" 3}', "x.jsonl line 2 is not JSON: Expecting ':' delimiter"),
        (b"[1]", "x.jsonl line 2 is not a JSON object"),
        (b'{"body": "b", "id": 1}', "x.jsonl line 2 has no string in field 'text'; its fields are 'body', 'id'"),
        (b"\xff\xfe", "x.jsonl line 2 is not JSON"),
    ],
)
def test_a_bad_json_line_is_named(line, message):
    with pytest.raises(UserError, match=message):
        json_text(line, "text", "x.jsonl line 2")


def test_a_bad_line_reaches_the_user_as_one_error(tmp_path):
    from endistill_jax.tasks.pretraining import text_files_task

    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\nbad\n')
    task = text_files_task("test_bad_v1", f"{tmp_path}/bad.jsonl", "bytes", held_out=0.0)
    with pytest.raises(UserError, match=r"^\S*bad.jsonl line 2 is not JSON: [^\n]*$"):
        list(_finite(task))


def test_no_text_at_all_is_an_error_and_not_an_endless_wait(tmp_path):
    from endistill_jax.tasks.pretraining import text_files_task

    (tmp_path / "empty.txt").write_text("\n\n")
    task = text_files_task("test_empty_v1", f"{tmp_path}/*.txt", "bytes", held_out=0.0)
    with pytest.raises(UserError, match="no example to train on in test_empty_v1, train"):
        next(_finite(task, repeat=True))


def _finite(task, repeat=False):
    lengths = {"inputs": 32, "targets": 32}
    return make_iterator(task, split="train", task_feature_lengths=lengths, batch_size=1, seed=0, repeat=repeat)
