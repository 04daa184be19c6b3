"""Table a: a distillation step next to its floor, a teacher's forward pass and a student's own step.

    python benchmarks/step.py --shape=base --dtype=float32 --out=docs/results/performance

times in turn, A B C A B C, after two rounds that are not counted:

    teacher forward   taps and logits that the objective reads
    student step      pretraining of the same student on the same batch: forward, cross-entropy, backward, update
    whole step        distillation by the objective `union`, of the same function that every job trains with
    relation losses   all relations of the objective on given taps, value and gradient
    dense losses      with --dense: the whole step with all scores and logits in memory at once
    matmul            square `jnp.dot` in both types: the ceiling is the best of the sizes

and prints medians, model FLOP/s by our formula (endistill_jax/train/flops.py) as a share of that ceiling, compilation
and the compiler's count of temporaries. `overhead` is whole / (teacher + student). It fails if anything is compiled in
the rounds that are timed. Expect 1 minute at tiny, 3 at small and more at base on two cores. In bfloat16 on CPU the
ceiling is XLA's own, of the type that the model computes in.
"""

import argparse
import statistics

from measuring import Column, ceilings, interleave, machine, matmul_runs, no_compilation, tell, timed_row
from programs import Program, positions, relation_losses, student_step, teacher_forward, whole_step
from shapes import add_arguments, settings_of, shape_of, title_of

from endistill_jax.objectives.implementation import DENSE

COLUMNS = (
    Column(key="name", title="What"),
    Column(key="median", title="Median (s)", kind="number"),
    Column(key="least", title="Least (s)", kind="number"),
    Column(key="gflop", title="Model GFLOP", kind="number"),
    Column(key="gflops", title="GFLOP/s", kind="number"),
    Column(key="of_ceiling", title="Of the ceiling", kind="share"),
    Column(key="tokens_per_second", title="Tokens/s", kind="count"),
    Column(key="compile_seconds", title="Compilation (s)", kind="number"),
    Column(key="temporary_mib", title="Temporaries (MiB)", kind="number"),
)


def row_of(name: str, program: Program, seconds: list[float], ceiling: float, tokens: int) -> dict:
    """A row of the table."""
    found = timed_row(name, seconds, program.flops, tokens)
    return found | {
        "gflop": program.flops / 1e9,
        "counted_gflop": program.counted_flops / 1e9,
        "of_ceiling": 1e9 * found["gflops"] / ceiling,
        "compile_seconds": program.compile_seconds,
        "trace_seconds": program.trace_seconds,
        "temporary_mib": program.temporary_bytes / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, shape="tiny")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dense", action="store_true", help="the whole step with dense losses too")
    parser.add_argument("--out", help="folder for Markdown and JSON")
    given = parser.parse_args()
    shape, facts = shape_of(given), machine()
    programs = {
        "teacher forward": teacher_forward(shape),
        "student step": student_step(shape),
        "whole step": whole_step(shape),
        "relation losses": relation_losses(shape),
    }
    if given.dense:
        programs["whole step, dense losses"] = whole_step(shape, implementation=DENSE)
    matmuls = matmul_runs(("float32", "bfloat16"))
    runs = {name: program.run for name, program in programs.items()} | matmuls
    for run in runs.values():
        run()
    with no_compilation():
        times = interleave(runs, given.rounds)
    ceiling = ceilings(times)
    tokens = positions(shape.lengths)
    rows = [row_of(name, program, times[name], ceiling[given.dtype], tokens) for name, program in programs.items()]
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    facts = {
        "overhead": median["whole step"] / (median["teacher forward"] + median["student step"]),
        "relations of whole": median["relation losses"] / median["whole step"],
        "counted products over formula": {name: each.counted_flops / each.flops for name, each in programs.items()},
        "ceiling GFLOP/s": {dtype: flops / 1e9 for dtype, flops in ceiling.items()},
        "shape": settings_of(given, shape),
        "machine": facts,
    }
    tell(given.out, f"step_{given.shape}_{given.dtype}", title_of(given, shape), rows, COLUMNS, facts)


if __name__ == "__main__":
    main()
