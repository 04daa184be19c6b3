"""How far a model that was imported or exported is from the implementation on the other side, as a Markdown table.

    python benchmarks/checkpoint_differences.py

builds small random models of every kind, padding included, and compares what both sides compute in float32: the largest
absolute difference at real tokens of the logits, of the encoder's output, and of the last layer's queries, keys and
values; whether greedy decoding gives the same tokens; and whether import, export and import again give the same bits.
A side that is not installed is left out, and said so.
"""

import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

TESTS = pathlib.Path(__file__).resolve().parent.parent / "tests" / "checkpoints"
sys.path[:0] = [str(TESTS), str(TESTS / "huggingface"), str(TESTS / "t5x_checkpoints")]

from comparison import differences, generate_ours, run_ours  # noqa: E402

from endistill_jax.checkpoints import huggingface, t5x  # noqa: E402
from endistill_jax.checkpoints.fingerprint import fingerprint_params  # noqa: E402
from endistill_jax.checkpoints.interchange import assemble  # noqa: E402
from endistill_jax.models.family import init_params, unstack_layers  # noqa: E402
from endistill_jax.models.t5.config import T5Config  # noqa: E402


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        kind: of model.
        direction: from where to where.
        logits: largest difference.
        encoded: largest difference of the encoder's output.
        taps: largest difference of the last layer's projections.
        greedy: whether both generate the same tokens; None if the other side was not asked.
        exact: whether a round trip gives the same bits.
    """

    kind: str
    direction: str
    logits: float
    encoded: float
    taps: float
    greedy: bool | None
    exact: bool


def huggingface_rows() -> Iterator[Row]:
    """transformers' models in float32, both ways."""
    import record_goldens as recorder
    import transformers

    names = {
        "relu_tied": "v1.0 (plain ReLU, tied and scaled head)",
        "gated_untied": "v1.1, LM-adapted, FLAN (gated GELU, own head)",
        "gated_tied": "gated GELU, tied and scaled head",
        "mt5": "mT5 (own class, large odd vocabulary)",
    }
    for kind in recorder.KINDS:
        for direction in ("Hugging Face to ours", "ours to Hugging Face"):
            with tempfile.TemporaryDirectory() as folder:
                theirs, ours = pathlib.Path(folder, "theirs"), pathlib.Path(folder, "ours")
                model = recorder.build_model(kind, seed=3).float()
                model.save_pretrained(theirs)
                params, config = huggingface.load(theirs)
                if direction.startswith("ours"):
                    params = jax.device_get(init_params(config, jax.random.key(0)))
                huggingface.save(ours, params, config)
                exact = fingerprint_params(huggingface.load(ours)[0]) == fingerprint_params(params)
                if direction.startswith("ours"):
                    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(ours).eval()
            batch = recorder.build_batch(kind, seed=3)
            found = differences(run_ours(params, config, batch), recorder.run_model(model, batch), batch)
            tokens = generate_ours(params, config, batch, recorder.GENERATED)
            greedy = np.array_equal(tokens, recorder.generate(model, batch))
            yield Row(kind=names[kind], direction=direction, greedy=greedy, exact=exact, **found)


def t5x_rows() -> Iterator[Row]:
    """T5X's networks in float32, both ways, padded and packed; what T5X saves is read in both of its formats."""
    import record_t5x as recorder

    names = {
        "v1_0": "v1.0 (plain ReLU, tied and scaled head)",
        "v1_1": "v1.1, LM-adapted, FLAN (gated GELU, own head)",
        "mt5": "mT5 (large odd vocabulary)",
        "scanned": "v1.1, scanned layers on axis 1",
        "scanned_first": "v1.0, scanned layers on axis 0",
    }
    for kind, name in names.items():
        reference = recorder.build(kind, seed=3)
        for written, save in (("T5X", recorder.save_native), ("T5X (Orbax)", recorder.save_orbax)):
            with tempfile.TemporaryDirectory() as theirs, tempfile.TemporaryDirectory() as ours:
                save(reference, theirs)
                source = t5x.open_checkpoint(theirs)
                params = assemble(source, np.float32)[0]
                exact = _t5x_round_trip(params, source.config, ours, kind)
            yield _t5x_row(recorder, reference, source.config, params, None, f"{written} to ours", name, exact)
        if kind == "scanned_first":
            continue  # never written: T5X itself puts layers second by default
        fresh = jax.device_get(init_params(source.config, jax.random.key(0)))
        with tempfile.TemporaryDirectory() as ours:
            exact = _t5x_round_trip(fresh, source.config, ours, kind)
            theirs = recorder.checkpoints.load_t5x_checkpoint(ours)["target"]
        unstacked = unstack_layers(fresh)
        flat = {"/".join(path): leaf for path, leaf in traverse_util.flatten_dict(unstacked).items()}
        reference = recorder.Reference(kind, flat)
        yield _t5x_row(recorder, reference, source.config, fresh, theirs, "ours to T5X", name, exact)


def _t5x_round_trip(params: Any, config: T5Config, folder: str, kind: str) -> bool:
    t5x.save(folder, params, config, step=1, scanned=kind.startswith("scanned"))
    return assemble(t5x.open_checkpoint(folder), np.float32)[1] == fingerprint_params(params)


def _t5x_row(
    recorder: Any, reference: Any, config: T5Config, params: Any, theirs: Any, direction: str, name: str, exact: bool
) -> Row:
    found: dict[str, float] = {}
    for make in (recorder.padded_batch, recorder.packed_batch):
        batch = make(config.vocab_size, seed=3)
        now = differences(run_ours(params, config, batch), recorder.run(reference, batch, theirs), batch)
        found = {key: max(value, found.get(key, 0.0)) for key, value in now.items()}
    return Row(kind=name, direction=direction, greedy=None, exact=exact, **found)


SIDES: tuple[Callable[[], Iterator[Row]], ...] = (huggingface_rows, t5x_rows)


def main() -> None:
    yes_or_no = {True: "yes", False: "NO", None: "not asked"}
    print("| kind | direction | logits | encoder output | taps | same greedy tokens | same bits after a round trip |")
    print("|---|---|---|---|---|---|---|")
    for rows in SIDES:
        try:
            for row in rows():
                numbers = " | ".join(f"{value:.1e}" for value in (row.logits, row.encoded, row.taps))
                answers = f"{yes_or_no[row.greedy]} | {yes_or_no[row.exact]}"
                print(f"| {row.kind} | {row.direction} | {numbers} | {answers} |", flush=True)
        except ImportError as error:
            print(f"{rows.__name__} left out: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
