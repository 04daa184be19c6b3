"""What processes tell each other is compared by name, and every value is told with who has it."""

import pathlib
import shutil

from endistill_jax import multihost


def test_equal_facts_have_no_difference():
    assert multihost.describe_differences([{"a": "1", "b": "x"}] * 3) == []


def test_every_difference_is_named_with_the_processes_that_have_each_value():
    told = [{"same": "0", "seed": "1"}, {"same": "0", "seed": "2", "extra": "true"}, {"same": "0", "seed": "1"}]
    assert multihost.describe_differences(told) == [
        "extra is absent on processes 0, 2 and true on process 1",
        "seed is 1 on processes 0, 2 and 2 on process 1",
    ]


def test_many_processes_and_long_values_stay_one_short_line():
    (phrase,) = multihost.describe_differences([{"a": "x" * 5000}] * 200 + [{"a": "y"}])
    assert len(phrase) < 250 and "processes 0, 1, 2, 3, 4, 5, 6, 7, ... and y on process 200" in phrase


def test_a_process_alone_agrees_with_itself_and_leaves_no_trace(tmp_path):
    multihost.agree("anything", {"a": 1})
    multihost.agree_on_folder(str(tmp_path / "none"))
    assert not list(tmp_path.iterdir())


def test_code_differs_when_one_character_of_the_source_does(tmp_path, monkeypatch):
    package = pathlib.Path(multihost.__file__).parent
    copy = tmp_path / "endistill_jax"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("*.pyc", "assets", "gin"))
    facts = multihost.code_versions()
    assert facts["packages"]["jax"] is not None and len(facts["endistill_jax"]["source"]) == 64
    monkeypatch.setattr(multihost, "__file__", str(copy / "multihost.py"))
    assert multihost.code_versions() == facts
    file = copy / "objectives" / "objective.py"
    file.write_text(file.read_text() + " ")
    assert multihost.code_versions()["endistill_jax"]["source"] != facts["endistill_jax"]["source"]
