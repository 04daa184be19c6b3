"""Inference: generates text for every line of a file. Needs no TensorFlow.

Each valid line of the input gives one line of the output, in order: an object with its number `line`, `inputs`,
`prediction`, `score` (see `Decoded.scores`), and `cut` if the input was too long. The settings are stored next to the
output, in `<output_file>.run.json`. The same command resumes an interrupted run, and produces the same file.

On several hosts each reads the input, which must be the same; only the primary host reads and writes the output.
"""

import dataclasses
import sys
from itertools import islice
from typing import Any

import jax

from endistill_jax.checkpoints.fingerprint import fingerprint_vocabulary
from endistill_jax.checkpoints.models import TrainedModel, choose_vocabulary, open_model, print_notes
from endistill_jax.checkpoints.tokenizer import BYTES, Tokenizer, load_tokenizer
from endistill_jax.core.errors import UserError
from endistill_jax.data.input_lines import InputFile
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
    """
    file, log = InputFile(input_file, field=reading.field), RecordLog(output_file)
    trained = open_model(model, dtype)
    print_notes(trained)
    tokenizer = find_tokenizer(trained, vocabulary_file, extra_ids)
    predictor = Predictor(
        trained.config,
        decoding,
        make_mesh(*mesh),
        batch_size=batch_size,
        inputs_length=reading.inputs_length,
        seed=seed,
        sharding=placement,
    )
    if dry_run:
        print(f"{model}: {trained.config}\nwould read {input_file} and write {output_file}, {decoding}, {reading}")
        return None
    is_primary = jax.process_index() == 0
    manifest = {
        "vocabulary": fingerprint_vocabulary(tokenizer),
        "batch_size": batch_size,
        "dtype": dtype,
        "seed": seed,
        "decoding": dataclasses.asdict(decoding),
        "reading": dataclasses.asdict(reading),
        "input": file.identity(),
    }
    if is_primary:
        log.check(manifest, unknown=("model",))  # before the model is read
    params = trained.load(predictor.shardings)
    done = _open_output(log, manifest | {"model": trained.fingerprint})
    written, cut, bad = done.records, done.marked[CUT], 0

    most = reading.inputs_length - 1  # without the end
    lines = iter(file)
    while window := list(islice(lines, batch_size * WINDOW_BATCHES)):
        for line in (line for line in window if line.problem is not None):
            if reading.bad_lines == "fail":
                raise UserError(f"{line.problem}; correct it, or skip such lines with Reading.bad_lines = 'skip'")
            bad += 1
            if line.number > done.last:
                _log(f"skipped: {line.problem}")
        good = [line for line in window if line.problem is None]
        if not good or window[-1].number <= done.last:
            continue
        encoded = [tokenizer.encode(reading.prefix + line.text) for line in good]
        for line, ids in zip(good, encoded, strict=True):
            if len(ids) > most and reading.long_inputs == "fail":
                raise UserError(
                    f"line {line.number} has {len(ids) + 1} tokens with its end, and inputs_length is "
                    f"{reading.inputs_length}; raise it, or set Reading.long_inputs = 'cut'"
                )
        inputs = [(*ids[:most], tokenizer.eos_id) for ids in encoded]
        tokens, scores = predictor.generate(params, inputs, [line.number for line in good])
        records = []
        for line, ids, answer, score in zip(good, encoded, tokens.tolist(), scores, strict=True):
            record = {NUMBER: line.number, "inputs": line.text, "prediction": tokenizer.decode(answer)}
            records.append(record | {"score": float(score)} | ({CUT: True} if len(ids) > most else {}))
        missing = [record for record in records if record[NUMBER] > done.last]
        if is_primary:
            log.append(missing)
        written, cut = written + len(missing), cut + sum(CUT in record for record in missing)
        _log(f"line {good[-1].number} of {manifest['input']['lines']}")
    print(
        f"{output_file}: {written} lines written, {bad} bad lines skipped, "
        f"{cut} inputs cut to {reading.inputs_length} tokens"
    )
    return written


def find_tokenizer(model: TrainedModel, file: str | None, extra_ids: int) -> Tokenizer:
    """The tokenizer of the vocabulary given by the user, or of the one stored with the model; refuses another one."""
    if file == BYTES:
        tokenizer = load_tokenizer(BYTES, extra_ids=extra_ids)
        if model.has_other_vocabulary(tokenizer):
            raise UserError(
                f"{model.source} was trained with another vocabulary than {BYTES} with {extra_ids} extra ids"
            )
    elif found := choose_vocabulary(model, file, extra_ids):
        tokenizer = load_tokenizer(found.path, extra_ids=found.extra_ids)
    else:
        raise UserError(f"no vocabulary is stored with {model.source}; give its SentencePiece model: vocabulary_file")
    check_vocabularies(tokenizer, model.config, None)
    return tokenizer


def _open_output(log: RecordLog, manifest: dict[str, Any]) -> Done:
    """Opens the output and broadcasts its progress to all hosts; `length` is valid on the primary host only."""
    agree("model and settings", manifest)
    found = Done(marked={CUT: 0})
    if jax.process_index() == 0:
        found = log.read(manifest, count=(CUT,))
        log.start(manifest, found)
    last, records, cut = map(int, gather([found.last, found.records, found.marked[CUT]])[0])
    if last:
        _log(f"resumes after line {last}")
    return Done(last=last, records=records, marked={CUT: cut})


def _log(text: str) -> None:
    if jax.process_index() == 0:
        print(f"infer: {text}", file=sys.stderr, flush=True)
