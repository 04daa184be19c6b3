"""The corpus builder, on a small folder of sources, and one look at the real standard library."""

import concurrent.futures
import pathlib

import pytest
import seqio

from endistill_jax.core.errors import UserError
from endistill_jax.data import docstrings, python_docs
from endistill_jax.data.python_docs import PythonDocsConfig, PythonDocsSource, python_docs_builder


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for number in range(120):
        word = chr(97 + number % 26) + chr(97 + number // 26)
        (folder / f"module_{number}.py").write_text(
            f'"""Things that {word} does to {word} when all {word}s are away."""\n'
        )
    return PythonDocsConfig(name="folder", folder=str(folder), files=2)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


def _texts(builder):
    return {
        split: [example["text"].decode() for example in builder.as_dataset(split).as_numpy_iterator()]
        for split in docstrings.SPLIT_PERCENTAGES
    }


def test_splits_are_disjoint_and_complete(config, data_dir):
    texts = _texts(python_docs_builder(config, data_dir))
    assert sum(map(len, texts.values())) == 120 == len(set().union(*texts.values()))
    assert all(docstrings.split_of(text) == split for split in texts for text in texts[split])
    assert len(texts["train"]) > 90 and texts["validation"] and texts["test"]


def test_preparing_again_gives_the_same_corpus(config, data_dir, tmp_path):
    assert _texts(python_docs_builder(config, data_dir)) == _texts(python_docs_builder(config, str(tmp_path)))


def test_two_at_once_prepare_one_corpus_without_noise(config, tmp_path, capfd):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        builders = list(pool.map(lambda _: python_docs_builder(config, str(tmp_path)), range(2)))
    assert _texts(builders[0]) == _texts(builders[1])
    assert not list(tmp_path.rglob("*incomplete*"))
    assert "ownload" not in "".join(capfd.readouterr())


def test_cached_corpus_of_another_python_is_not_used(config, data_dir, monkeypatch, tmp_path):
    ours = python_docs_builder(config, data_dir)
    monkeypatch.setattr(python_docs.platform, "python_version", lambda: "3.99.0")
    other = python_docs_builder(config, data_dir)
    assert pathlib.Path(other.data_dir) != pathlib.Path(ours.data_dir)
    assert other.info.metadata["python"].endswith("3.99.0") and not ours.info.metadata["python"].endswith("3.99.0")


def test_cache_folder_follows_the_environment(config, monkeypatch, tmp_path):
    monkeypatch.setenv("ENDISTILL_CACHE", str(tmp_path / "chosen"))
    assert python_docs.cache_folder() == tmp_path / "chosen"
    monkeypatch.delenv("ENDISTILL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert python_docs.cache_folder() == tmp_path / "endistill_jax"


def test_source_reads_every_host_its_own_files(config, data_dir):
    source = PythonDocsSource(config, data_dir)
    own = []
    for index in range(2):
        dataset = source.get_dataset("train", shuffle=False, shard_info=seqio.ShardInfo(index, 2))
        own.append({example["text"] for example in dataset.as_numpy_iterator()})
    assert not own[0] & own[1]
    assert len(own[0] | own[1]) == source.num_input_examples("train")


def test_near_copies_are_not_on_both_sides():
    shared = " ".join(f"word{chr(97 + n)}" for n in range(20))
    texts = [f"{shared} {chr(97 + n)}{chr(97 + n)}" for n in range(26)]
    documents = [docstrings.Document(text=text, module="m", name="", source="s") for text in texts]
    splits = docstrings.split_documents(documents)
    held_out = splits["validation"] + splits["test"]
    assert not (splits["train"] and held_out) and (splits["train"] or held_out)


def test_standard_library_is_english_text():
    library = docstrings.standard_library()
    topics = list(docstrings.read_topics(library / "pydoc_data" / "topics.py"))
    assert len(topics) > 50 and sum(len(topic.text) for topic in topics) > 300_000
    found = list(docstrings.read_files([(library / "textwrap.py", pathlib.PurePath("textwrap.py"))], "stdlib"))
    assert ("textwrap", "TextWrapper.fill") in {(document.module, document.name) for document in found}


def test_unknown_configuration():
    with pytest.raises(UserError, match="no configuration 'all'; it has stdlib, packages"):
        PythonDocsSource("all")
