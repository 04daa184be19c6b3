"""Batches: features, epochs, hosts, evaluation, and the state that goes into a checkpoint."""

import re

import numpy as np
import pytest
import seqio

from endistill_jax.core.errors import UserError
from endistill_jax.data.pipeline import make_iterator

LENGTHS = {"inputs": 64, "targets": 32}
FIRST_SENTINEL = 258 + 100


def _iterator(task, **settings):
    defaults = {"split": "train", "task_feature_lengths": LENGTHS, "batch_size": 4, "seed": 0, "pack": False}
    return make_iterator(task, **defaults | settings)


def _take(iterator, number):
    return [next(iterator) for _ in range(number)]


def _same(left, right):
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in zip(left, right, strict=True)
    )


@pytest.fixture(scope="module")
def texts_of(restore_text):
    """Numbers of the documents in batches that are not packed, in order."""

    def texts(batches):
        rows = [row for b in batches for row in zip(b["encoder_input_tokens"], b["decoder_target_tokens"], strict=True)]
        restored = (bytes(t - 3 for t in restore_text(i, d, FIRST_SENTINEL)).decode() for i, d in rows if i.any())
        return [int(number) for text in restored for number in re.findall(r"<(\d{3})>", text)]

    return texts


def test_documents_come_out_whole(document_task, texts_of, documents):
    batches = list(_iterator(document_task, repeat=False, shuffle=False, batch_size=7))
    assert sorted(texts_of(batches)) == list(range(len(documents)))


def test_every_epoch_is_newly_corrupted(document_task, texts_of, documents):
    first, second = _take(_iterator(document_task, batch_size=60, shuffle=False), 2)
    assert sorted(texts_of([first])) == sorted(texts_of([second])) == list(range(len(documents)))
    unchanged = (first["encoder_input_tokens"] == second["encoder_input_tokens"]).all(axis=1)
    assert unchanged.sum() <= 2


def test_shuffling_changes_the_order_of_every_epoch(document_task, texts_of, documents):
    # A buffer of one third of an epoch.
    batches = _take(_iterator(document_task, batch_size=60, shuffle_buffer=20), 4)
    orders = [texts_of([batch]) for batch in batches]
    assert len({tuple(order) for order in orders}) == 4
    assert set(sum(orders, [])) == set(range(len(documents)))


def test_same_seed_same_batches_and_another_seed_others(stream_task):
    batches = [_take(_iterator(stream_task, seed=seed), 5) for seed in (1, 1, 2)]
    assert _same(batches[0], batches[1])
    assert not _same(batches[0], batches[2])


def test_inputs_and_targets_are_full_when_documents_run_on(stream_task):
    from endistill_jax.data.span_corruption import corruption_lengths

    targets_length = corruption_lengths(LENGTHS["inputs"])[1]
    for batch in _take(_iterator(stream_task), 10):
        assert (batch["encoder_input_tokens"] > 0).all()
        assert ((batch["decoder_target_tokens"] > 0).sum(axis=1) == targets_length).all()


def test_decoder_features_are_shifted_and_weighted(stream_task):
    batch = next(_iterator(stream_task))
    targets = batch["decoder_target_tokens"]
    np.testing.assert_array_equal(batch["decoder_loss_weights"], targets > 0)
    np.testing.assert_array_equal(batch["decoder_input_tokens"], np.pad(targets, [(0, 0), (1, 0)])[:, :-1])
    assert all(value.dtype == np.int32 for value in batch.values())


def test_packed_segments_hold_whole_examples(document_task, restore_text, documents):
    lengths = {"inputs": 256, "targets": 64}
    batches = list(_iterator(document_task, pack=True, repeat=False, task_feature_lengths=lengths, batch_size=2))
    found = []
    for batch in batches:
        for row in range(2):
            inputs, targets = (batch[name][row] for name in ("encoder_input_tokens", "decoder_target_tokens"))
            segments = batch["encoder_segment_ids"][row]
            np.testing.assert_array_equal(segments > 0, inputs > 0)
            for segment in range(1, segments.max() + 1):
                mine = (inputs[segments == segment], targets[batch["decoder_segment_ids"][row] == segment])
                found.append(bytes(token - 3 for token in restore_text(*mine, FIRST_SENTINEL)).decode())
    assert sorted(found) == sorted(documents)
    assert batches[0]["encoder_segment_ids"].max() > 1


@pytest.mark.parametrize("process_count", [2, 8])  # the source has 6 files: shared by file, then by document
def test_hosts_share_an_epoch_without_overlap(document_task, texts_of, documents, process_count):
    own = []
    for process in range(process_count):
        # Documents come in the order of their files, so one epoch of a host's share ends before any comes again.
        iterator = _iterator(
            document_task, batch_size=process_count, shuffle=False, part_index=process, part_count=process_count
        )
        seen = []
        while (number := texts_of([next(iterator)])[0]) not in seen:
            seen.append(number)
        own.append(set(seen))
    assert sorted(number for share in own for number in share) == list(range(len(documents)))


def _on_hosts(task, hosts, **settings):
    return [_iterator(task, batch_size=12, part_index=i, part_count=hosts, **settings) for i in range(hosts)]


def _joined(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 3)])
def test_a_stream_goes_on_exactly_on_another_number_of_hosts(stream_task, before, after):
    """Its shards are a property of the stream: 2 here, read whole, or in parts by several hosts."""
    whole = _iterator(stream_task, batch_size=12, shards=2, shuffle_buffer=10)
    wanted = _take(whole, 8)
    hosts = _on_hosts(stream_task, before, shards=2, shuffle_buffer=10)
    assert _same([_joined([next(host) for host in hosts]) for _ in range(4)], wanted[:4])
    saved = [host.state() for host in hosts]
    states = {name: state for each in saved for name, state in each.items()}
    assert len(states) == sum(map(len, saved)) == 2, "each shard is saved once"
    others = _on_hosts(stream_task, after, shards=2, shuffle_buffer=10)
    for host in others:
        host.restore({name: states[name] for name in host.names})
    assert _same([_joined([next(host) for host in others]) for _ in range(4)], wanted[4:])


def test_a_host_reads_only_the_shards_of_its_rows(stream_task):
    assert [host.names for host in _on_hosts(stream_task, 2)] == [("shard_0_of_2",), ("shard_1_of_2",)]
    assert [host.names for host in _on_hosts(stream_task, 2, shards=4)] == [
        ("shard_0_of_4", "shard_1_of_4"),
        ("shard_2_of_4", "shard_3_of_4"),
    ]
    assert [host.names for host in _on_hosts(stream_task, 2, shards=1)] == [("shard_0_of_1",)] * 2


def test_shuffled_hosts_stay_apart_for_several_epochs(document_task, texts_of):
    own = [set(texts_of(_take(_iterator(document_task, part_index=p, part_count=2, batch_size=40), 8))) for p in (0, 1)]
    assert not own[0] & own[1]
    assert len(own[0]) == len(own[1]) == 30


def test_validation_is_the_same_for_any_number_of_hosts(document_task):
    settings = {"split": "train", "repeat": False, "shuffle": False, "batch_size": 8}
    whole = list(_iterator(document_task, **settings))
    halves = [list(_iterator(document_task, **settings, part_index=p, part_count=2)) for p in (0, 1)]
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*halves, strict=True)]
    assert _same(whole, joined)


def test_last_batch_of_validation_is_filled_with_empty_rows(document_task, documents):
    batches = list(_iterator(document_task, repeat=False, shuffle=False, batch_size=16))
    assert len(batches) == 4
    last = batches[-1]
    assert all(value.shape[0] == 16 and not value[len(documents) - 48 :].any() for value in last.values())
    assert last["decoder_loss_weights"][: len(documents) - 48].any(axis=1).all()


def test_held_out_documents_are_not_trained_on(stream_task, documents):
    splits = [
        {example["text"].decode() for example in stream_task.source.get_dataset(split).as_numpy_iterator()}
        for split in ("train", "validation")
    ]
    assert splits[0] | splits[1] == set(documents)
    assert not splits[0] & splits[1] and len(splits[1]) > 5


# At the start, within an epoch, after several.
@pytest.mark.parametrize(("taken", "pack"), [(0, False), (3, False), (40, False), (40, True)])
def test_state_restores_exactly(stream_task, taken, pack):
    iterator = _iterator(stream_task, pack=pack, shuffle_buffer=30)  # an epoch has about 25 examples
    _take(iterator, taken)
    state = iterator.state()
    following = _take(iterator, 40)
    other = _iterator(stream_task, pack=pack, shuffle_buffer=30)
    next(other)
    other.restore(state)
    assert _same(_take(other, 40), following)


def test_state_restores_exactly_at_every_step(stream_task):
    iterator = _iterator(stream_task, shuffle_buffer=10)
    batches, states = [], []
    for _ in range(24):
        states.append(iterator.state())
        batches.append(next(iterator))
    for step in (0, 1, 4, 7, 11):
        iterator.restore(states[step])
        assert _same(_take(iterator, 12), batches[step : step + 12])


def test_taking_the_state_changes_nothing(stream_task):
    quiet, saved = (_iterator(stream_task, shuffle_buffer=10) for _ in range(2))
    batches = []
    for _ in range(10):
        batches.append(next(saved))
        saved.state()
    assert _same(_take(quiet, 10), batches)


def test_state_of_a_finished_pass_is_finished(document_task):
    iterator = _iterator(document_task, repeat=False)
    list(iterator)
    state = iterator.state()
    other = _iterator(document_task, repeat=False)
    other.restore(state)
    assert list(other) == []


def test_state_of_other_settings_is_refused_by_name(stream_task):
    state = _iterator(stream_task, seed=1).state()
    with pytest.raises(UserError, match="batch_size is 4 there and 8 here; seed is 1 there and 2 here"):
        _iterator(stream_task, seed=2, batch_size=8).restore(state)
    with pytest.raises(UserError, match="not the state"):
        _iterator(stream_task).restore({"shard_0_of_1": b"nonsense"})
    with pytest.raises(UserError, match="no state of the data shard_1_of_2, only of shard_0_of_2"):
        _iterator(stream_task, shards=2).restore({"shard_0_of_2": b""})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "tests"}, "has no split 'tests'; it has train, validation"),
        ({"batch_size": 5, "part_count": 2}, "batch_size 5 does not divide over 2 parts"),
        ({"batch_size": 4, "shards": 3}, "batch_size 4 does not divide over 3 shards"),
        ({"task_feature_lengths": {"inputs": 64, "targets": 9}}, "targets of 9 tokens are too short.*need 14"),
    ],
)
def test_mistakes_are_told_at_once(stream_task, settings, message):
    with pytest.raises(UserError, match=message):
        _iterator(stream_task, **settings)


def test_mixtures_mix(stream_task, document_task):
    name = "test_mixture_v1"
    seqio.MixtureRegistry.remove(name)
    seqio.MixtureRegistry.add(name, [(stream_task.name, 1.0), (document_task.name, 1.0)])
    iterator = _iterator(name, shuffle_buffer=10)
    batches = _take(iterator, 20)
    full = [(batch["encoder_input_tokens"] > 0).all(axis=1) for batch in batches]
    assert 0.2 < np.mean(full) < 0.8  # 80 rows, each of either task with probability one half
    state = iterator.state()
    following = _take(iterator, 10)
    iterator.restore(state)
    assert _same(_take(iterator, 10), following)
