"""Texts of a task, for training a vocabulary."""

import pytest
import seqio

from endistill_jax.core.errors import UserError
from endistill_jax.data.text_pipeline import read_texts, resolve_task


def test_texts_of_a_task_are_its_documents(document_task, documents):
    texts = list(read_texts(document_task.name))
    assert sorted(texts) == sorted(documents)
    assert texts == list(read_texts(document_task.source))
    assert list(read_texts(document_task, max_documents=3)) == texts[:3]


def test_mistakes_are_told(document_task, stream_task):
    with pytest.raises(UserError, match="the source has no split 'test'; it has train"):
        read_texts(document_task, split="test")
    with pytest.raises(UserError, match="no 'body'; they have text"):
        next(read_texts(document_task, text_field="body"))
    mixture = seqio.Mixture("test_texts_mixture", [(document_task.name, 1.0), (stream_task.name, 1.0)])
    with pytest.raises(UserError, match="is a mixture; name one of its tasks: test_documents_v1, test_stream_v1"):
        read_texts(mixture)


def test_unknown_task_names_similar_ones():
    with pytest.raises(
        UserError, match="no task or mixture named 'python_doc_stdlib_span_v1'; there is .*python_docs_stdlib"
    ):
        resolve_task("python_doc_stdlib_span_v1")


def test_tasks_given_as_objects_are_left_alone(document_task):
    assert resolve_task(document_task) is document_task
