"""Inference: generates text for every line of a file.

Each valid line of the input gives one line of the output, in order: an object with its number `line`, `inputs`,
`prediction`, `score` (see `Decoded.scores`), and `cut` if the input was too long. The settings are stored next to the
output, in `<output_file>.run.json`. The same command resumes an interrupted run, and produces the same file.

On several hosts each reads the input, which must be the same; only the primary host reads and writes the output.
"""

import dataclasses
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import jax

from endistill_jax.checkpoints.fingerprint import fingerprint_vocabulary
from endistill_jax.checkpoints.models import TrainedModel, choose_vocabulary, open_model, print_notes
from endistill_jax.core.errors import UserError
from endistill_jax.evaluation.predictor import Predictor
from endistill_jax.models.generation.generation import Decoding
from endistill_jax.multihost import agree, gather
from endistill_jax.reports.files import NUMBER, Done, RecordLog
from endistill_jax.sharding import make_mesh
from endistill_jax.train.training import check_vocabularies

CHOICES = {"bad_lines": ("skip", "fail"), "long_inputs": ("cut", "fail")}
# Number of batches whose lines are read and sorted by length together. A resumed run recomputes such a group in full
# if any of its lines are missing, so its batches are those of an uninterrupted run.
WINDOW_BATCHES = 8
CUT = "cut"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How lines become inputs.

    Attributes:
        field: of the JSON objects of a `.jsonl` file, the one with the text.
        prefix: prepended to every text, such as "summarize: ".
        inputs_length: longest input in tokens, its end included.
        long_inputs: "cut" longer ones and count them, or "fail".
        bad_lines: "skip" a line that is empty, no UTF-8, no JSON object with the field, or half a surrogate pair in it,
            and name its number on standard error; or "fail".
    """

    field: str = "inputs"
    prefix: str = ""
    inputs_length: int = 512
    long_inputs: str = "cut"
    bad_lines: str = "skip"

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"Reading.{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        if self.inputs_length < 2:
            raise UserError(f"Reading.inputs_length is {self.inputs_length}; it must be at least 2, for the end is one")


def infer(
    *,
    model: str,
    input_file: str,
    output_file: str,
    decoding: Decoding,
    reading: Reading = Reading(),  # noqa: B008  frozen
    batch_size: int = 32,
    vocabulary_file: str | None = None,
    extra_ids: int = 100,
    dtype: str = "float32",
    mesh: tuple[int, int, int] = (-1, 1, 1),
    placement: str = "sharded",
    seed: int = 0,
    dry_run: bool = False,
) -> int | None:
    """Generates text for every line of a file; see above.

    Args:
        model: "bundled", a Hugging Face T5 folder or hub name, a T5X checkpoint, or the model directory of a run (its
            last checkpoint) or `checkpoints/<step>` in it.
        input_file: text, or JSONL by its name; `.gz` is unpacked.
        output_file: a local JSONL file.
        decoding: how text is generated.
        reading: how lines become inputs.
        batch_size: rows of a batch, over all hosts.
        vocabulary_file: SentencePiece model, or "bytes"; None uses the one stored with the model.
        extra_ids: sentinels above the pieces of `vocabulary_file`.
        dtype: float32 or bfloat16, of parameters and computations.
        mesh: sizes of the axes data, fsdp and tensor; -1 is inferred from the number of devices.
        placement: how the parameters are sharded: "sharded" or "replicated".
        seed: for sampling.
        dry_run: print what would be done, and do nothing.

    Returns:
        How many lines the output has; None after a dry run.

    Raises:
        UserError: invalid settings, or an output made with different ones, before anything is written; later a bad
            line or long input if set to "fail".
    """
    from endistill_jax.data.input_lines import InputFile

    file, log = InputFile(input_file, field=reading.field), RecordLog(output_file)
    trained = open_model(model, dtype)
    print_notes(trained)
    vocabulary = find_vocabulary(trained, vocabulary_file, extra_ids)
    settings = {"batch_size": batch_size, "inputs_length": reading.inputs_length, "seed": seed, "placement": placement}
    predictor = Predictor(trained.config, decoding, make_mesh(*mesh), **settings)
    if dry_run:
        print(f"{model}: {trained.config}\nwould read {input_file} and write {output_file}, {decoding}, {reading}")
        return None
    manifest = {
        "vocabulary": fingerprint_vocabulary(vocabulary),
        "batch_size": batch_size,
        "dtype": dtype,
        "seed": seed,
    }
    manifest |= {
        "decoding": dataclasses.asdict(decoding),
        "reading": dataclasses.asdict(reading),
        "input": file.facts(),
    }
    if jax.process_index() == 0:
        log.check(manifest, unknown=("model",))  # before the model is read
    params = trained.load(predictor.shardings)
    done = _begin(log, manifest | {"model": trained.fingerprint})
    encoder = _Encoder(vocabulary, reading, after=done.last)
    windows = encoder.windows(file, batch_size * WINDOW_BATCHES)
    answers = ((rows[-1].number, list(_answers(predictor, params, vocabulary, rows))) for rows in windows)
    done = _write(log, done, answers, of=manifest["input"]["lines"])
    print(
        f"{output_file}: {done.records} lines written, {encoder.bad} bad lines skipped, "
        f"{done.marked[CUT]} inputs cut to {reading.inputs_length} tokens"
    )
    return done.records


def _begin(log: RecordLog, manifest: dict[str, Any]) -> Done:
    """Opens the output and broadcasts its progress to all hosts; `length` is valid on the primary host only.

    Raises:
        UserError: it was made with a different manifest, or the hosts disagree on it.
    """
    agree("model and settings", manifest)
    found = Done(marked={CUT: 0})
    if jax.process_index() == 0:
        found = log.read(manifest, count=(CUT,))
        log.start(manifest, found)
    last, records, cut = map(int, gather([found.last, found.records, found.marked[CUT]])[0])
    if last:
        _say(f"resumes after line {last}")
    return Done(last=last, records=records, marked={CUT: cut})


def _write(log: RecordLog, done: Done, answers: Iterable[tuple[int, list[dict[str, Any]]]], of: int) -> Done:
    """Appends the missing records.

    Args:
        log: the output.
        done: the progress so far.
        answers: for each group of lines, the number of the last line and all records.
        of: the total number of lines.

    Returns:
        The progress at the end.
    """
    records, cut = done.records, done.marked[CUT]
    for number, answered in answers:
        new = [record for record in answered if record[NUMBER] > done.last]
        if jax.process_index() == 0:
            log.append(new)
        _say(f"line {number} of {of}")
        records, cut = records + len(new), cut + sum(CUT in record for record in new)
    return done._replace(records=records, marked={CUT: cut})


def _answers(predictor: Predictor, params: Any, vocabulary: Any, rows: list["_Row"]) -> Iterator[dict[str, Any]]:
    tokens, scores = predictor.generate(params, [row.ids for row in rows], [row.number for row in rows])
    for row, ids, score in zip(rows, tokens.tolist(), scores, strict=True):
        found = {NUMBER: row.number, "inputs": row.text, "prediction": vocabulary.decode(ids), "score": float(score)}
        yield found | ({CUT: True} if row.cut else {})


def find_vocabulary(model: TrainedModel, file: str | None, extra_ids: int) -> Any:
    """The vocabulary of a model: the one given by the user, or the one stored with it.

    Raises:
        UserError: if there is none, or it is not the model's.
    """
    from endistill_jax.data.vocabulary import BYTES, load_vocabulary

    if file == BYTES:
        vocabulary = load_vocabulary(BYTES, extra_ids=extra_ids)
        if model.has_other_vocabulary(vocabulary):
            raise UserError(
                f"{model.source} was trained with another vocabulary than {BYTES} with {extra_ids} extra ids"
            )
    else:
        found = choose_vocabulary(model, file, extra_ids)
        if found is None:
            raise UserError(
                f"no vocabulary is stored with {model.source}; give its SentencePiece model: vocabulary_file"
            )
        vocabulary = load_vocabulary(found.path, extra_ids=found.extra_ids)
    check_vocabularies(vocabulary, model.config, None)
    return vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row:
    number: int
    text: str
    ids: tuple[int, ...]
    cut: bool


class _Encoder:
    """Tokenizes lines in groups; counts bad lines, and reports those after line `after`."""

    def __init__(self, vocabulary: Any, reading: Reading, *, after: int):
        self._vocabulary, self._reading, self._after = vocabulary, reading, after
        self.bad = 0

    def windows(self, lines: Iterable[Any], size: int) -> Iterator[list[_Row]]:
        """The good lines of every `size` lines, from those on that have a line after `after`."""
        iterator = iter(lines)
        while window := list(islice(iterator, size)):
            for line in window:
                if line.problem is not None:
                    self._meet_bad(line)
            good = [line for line in window if line.problem is None]
            if good and window[-1].number > self._after:
                yield [self._row(line) for line in good]

    def _meet_bad(self, line: Any) -> None:
        if self._reading.bad_lines == "fail":
            raise UserError(f"{line.problem}; correct it, or skip such lines with Reading.bad_lines = 'skip'")
        self.bad += 1
        if line.number > self._after:
            _say(f"skipped: {line.problem}")

    def _row(self, line: Any) -> _Row:
        reading = self._reading
        ids, most = self._vocabulary.encode(reading.prefix + line.text), reading.inputs_length - 1
        if len(ids) > most and reading.long_inputs == "fail":
            raise UserError(
                f"line {line.number} has {len(ids) + 1} tokens with its end, and inputs_length is "
                f"{reading.inputs_length}; raise it, or set Reading.long_inputs = 'cut'"
            )
        kept = (*ids[:most], self._vocabulary.eos_id)
        return _Row(number=line.number, text=line.text, ids=kept, cut=len(ids) > most)


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(f"infer: {text}", file=sys.stderr, flush=True)
