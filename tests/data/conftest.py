"""A small source of its own for the data tests: 60 short documents in 6 files, all different, no corpus needed."""

import itertools
import pathlib

import numpy as np
import pytest

DOCUMENTS = [f"<{number:03d}> is text number {number} of sixty;" for number in range(60)]


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return DOCUMENTS


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(6):
        (folder / f"{number}.txt").write_text("\n".join(DOCUMENTS[number::6]) + "\n")
    return folder


@pytest.fixture(scope="session")
def document_task(files):
    """Each document by itself, in bytes: one example a document."""
    from endistill_jax.tasks.pretraining import text_files_task

    return text_files_task("test_documents_v1", f"{files}/*.txt", "bytes", held_out=0.0, concatenate=False)


@pytest.fixture(scope="session")
def stream_task(files):
    """Documents that run on into each other, in bytes; some held out."""
    from endistill_jax.tasks.pretraining import text_files_task

    return text_files_task("test_stream_v1", f"{files}/*.txt", "bytes", held_out=0.3)


@pytest.fixture(scope="session")
def restore_text():
    """The function that undoes span corruption: (inputs, targets, first sentinel) -> tokens."""

    def restore(inputs: np.ndarray, targets: np.ndarray, first_sentinel: int, sentinels: int = 100) -> list[int]:
        is_sentinel = lambda token: first_sentinel - sentinels < token <= first_sentinel  # noqa: E731
        spans, current = {}, None
        for token in itertools.takewhile(lambda token: token != 1, targets):
            if is_sentinel(token):
                current = spans.setdefault(int(token), [])
            else:
                current.append(int(token))
        text = []
        for token in itertools.takewhile(lambda token: token != 1, inputs):
            text += spans.pop(int(token)) if is_sentinel(token) else [int(token)]
        assert not spans, "a sentinel of the targets is not in the inputs"
        return text

    return restore
