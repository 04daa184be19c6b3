"""Table f: tokens a second of greedy decoding and beam search, next to Hugging Face's `generate`, and their scaling.

    python benchmarks/decoding.py --shape=tiny --out=docs/results/performance

exports one random model (the shape's teacher) to a Hugging Face folder and loads it in PyTorch. Its head is changed so
that the end never comes: every search runs over the whole length, and its first outputs must be the same tokens in both
libraries before anything is timed. Then all searches are timed in turn, encoder included; what is compiled or set up in
each one's first call is reported separately. The second table is ours alone: the time of one further token by the
length that the cache is made for. Expect 2 minutes at tiny on two cores.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from measuring import Column, interleave, machine, no_compilation, tell
from shapes import Shape, add_arguments, random_batch, random_teacher, shape_of

from endistill_jax.checkpoints import huggingface
from endistill_jax.models.generation.generation import Decoding, make_decoder
from endistill_jax.models.t5.config import T5Config

COLUMNS = (
    Column(key="search", title="Search"),
    Column(key="batch", title="Batch", kind="count"),
    Column(key="library", title="Library"),
    Column(key="median", title="Median (s)", kind="number"),
    Column(key="least", title="Least (s)", kind="number"),
    Column(key="tokens_per_second", title="Tokens/s", kind="count"),
    Column(key="of_theirs", title="Times Hugging Face", kind="number"),
    Column(key="first_call", title="First call (s)", kind="number"),
)
GROWTH_COLUMNS = (
    Column(key="batch", title="Batch", kind="count"),
    Column(key="length", title="Length", kind="count"),
    Column(key="median", title="Median (s)", kind="number"),
    Column(key="milliseconds", title="A further position (ms)", kind="number"),
)
OURS, THEIRS = "ours", "Hugging Face"
EOS = 1
SEARCHES = {"greedy": {"strategy": "greedy"}, "beam 4": {"strategy": "beam", "beams": 4}}
Run = Callable[[], np.ndarray]  # int [batch, length], and waits for it


def endless(params: Any, config: T5Config) -> Any:
    """The same parameters, with a head to which end and padding are never likely and layers that say more.

    Fresh layers hardly change what a token's own embedding says, and greedy decoding would repeat one token.
    """
    params = jax.tree.map(jnp.asarray, params)
    params["decoder"]["layers"] = jax.tree.map(lambda leaf: leaf * 2, params["decoder"]["layers"])
    if config.tied_head:
        table = params["token_embedder"]["embedding"]
        params["token_embedder"]["embedding"] = table.at[: EOS + 1].set(0)
    else:
        kernel = params["decoder"]["logits_dense"]["kernel"]
        params["decoder"]["logits_dense"]["kernel"] = kernel.at[:, : EOS + 1].set(0)
    return params


def our_run(config: T5Config, params: Any, tokens: np.ndarray, length: int, search: str) -> Run:
    """Our decoder on an array that is already on the device, as in a loop over batches."""
    decode = make_decoder(config, Decoding(max_length=length, eos_id=EOS, **SEARCHES[search]))
    placed = jax.device_put(tokens)
    return lambda: np.asarray(decode(params, placed).tokens)


def their_run(model: transformers.PreTrainedModel, tokens: np.ndarray, length: int, search: str) -> Run:
    """`generate` with its cache, on tensors that are already on the device."""
    inputs = torch.from_numpy(tokens.astype(np.int64)).to(model.device)
    settings = {"max_new_tokens": length, "do_sample": False, "num_beams": SEARCHES[search].get("beams", 1)}
    settings |= {"early_stopping": False, "length_penalty": 1.0, "use_cache": True}
    mask = (inputs != 0).long()

    def run() -> np.ndarray:
        with torch.inference_mode():
            return model.generate(input_ids=inputs, attention_mask=mask, **settings)[:, 1:].cpu().numpy()

    return run


def first_calls(runs: dict[tuple, Run]) -> tuple[dict[tuple, float], dict[tuple, np.ndarray]]:
    """Seconds of each one's first call, compilation included, and what it generated."""
    seconds, found = {}, {}
    for name, run in runs.items():
        began = time.perf_counter()
        found[name] = run()
        seconds[name] = time.perf_counter() - began
    return seconds, found


def check_same_work(found: dict[tuple, np.ndarray], length: int) -> dict[str, str]:
    """How many texts are the same in both libraries; nearly all must be, and all of the whole length.

    Raises:
        SystemExit: if they are not.
    """
    told = {}
    for search, batch, library in found:
        if library == OURS:
            ours, theirs = (found[search, batch, each] for each in (OURS, THEIRS))
            if theirs.shape != ours.shape or not ours.all():
                raise SystemExit(f"{search}, batch {batch}: a text ended before {length} tokens")
            same = int((ours == theirs).all(axis=1).sum())
            told[f"{search}, batch {batch}"] = f"{same} of {batch}"
            if same < 0.9 * batch:
                raise SystemExit(f"not the same work: {search} gives the same text for {same} of {batch} examples")
    return told


def compare(given: argparse.Namespace, shape: Shape, params: Any, tokens: np.ndarray, length: int) -> tuple:
    """Rows of the first table, and how many texts were the same."""
    with tempfile.TemporaryDirectory() as folder:
        huggingface.save(folder, jax.tree.map(np.asarray, params), shape.teacher)
        model = transformers.T5ForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, given.dtype))
    model = model.to("cuda" if jax.default_backend() == "gpu" else "cpu").eval()
    runs = {}
    for search in SEARCHES:
        for batch in given.batches:
            runs[search, batch, OURS] = our_run(shape.teacher, params, tokens[:batch], length, search)
            runs[search, batch, THEIRS] = their_run(model, tokens[:batch], length, search)
    first, found = first_calls(runs)
    same = check_same_work(found, length)
    with no_compilation():
        times = interleave(runs, given.rounds, warm_up=1)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    rows = [
        {
            "search": search,
            "batch": batch,
            "library": library,
            "seconds": times[search, batch, library],
            "median": medians[search, batch, library],
            "least": min(times[search, batch, library]),
            "tokens_per_second": batch * length / medians[search, batch, library],
            "of_theirs": medians[search, batch, THEIRS] / medians[search, batch, library],
            "first_call": first[search, batch, library],
        }
        for search, batch, library in runs
    ]
    return rows, same


def grow(given: argparse.Namespace, shape: Shape, params: Any, tokens: np.ndarray) -> list[dict]:
    """Rows of the second table: greedy decoding, each length against the one before."""
    runs = {
        (batch, length): our_run(shape.teacher, params, tokens[:batch], length, "greedy")
        for batch in given.batches
        for length in given.lengths
    }
    first_calls(runs)
    with no_compilation():
        times = interleave(runs, given.rounds, warm_up=1)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    rows = []
    for batch in given.batches:
        before = None
        for length in given.lengths:
            median = medians[batch, length]
            row = {"batch": batch, "length": length, "median": median, "seconds": times[batch, length]}
            if before is not None:
                row["milliseconds"] = 1e3 * (median - medians[batch, before]) / (length - before)
            rows.append(row)
            before = length
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, shape="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--length", type=int, help="tokens generated; the shape's target length if not given")
    parser.add_argument("--lengths", type=int, nargs="*", default=[32, 64, 128, 256], help="of the second table")
    parser.add_argument("--out", help="folder for Markdown and JSON")
    given = parser.parse_args()
    given.batch = max(given.batches)
    shape, facts = shape_of(given), machine()
    facts |= {"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()}
    length = given.length or shape.lengths.target
    params = endless(random_teacher(shape), shape.teacher)
    tokens = random_batch(shape)["encoder_input_tokens"]
    rows, same = compare(given, shape, params, tokens, length)
    title = f"{given.shape}, {given.dtype}, {shape.lengths.source} tokens in, {length} out"
    name = f"decoding_{given.shape}_{given.dtype}"
    tell(given.out, name, title, rows, COLUMNS, {"same texts": same, "settings": vars(given), "machine": facts})
    if given.lengths:
        rows = grow(given, shape, params, tokens)
        title = f"{given.shape}, {given.dtype}, greedy, by length"
        tell(given.out, f"{name}_growth", title, rows, GROWTH_COLUMNS, {"settings": vars(given), "machine": facts})


if __name__ == "__main__":
    main()
