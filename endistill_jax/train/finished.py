"""Runs that came to their end: what they found is read from their checkpoint's facts, and no array is opened."""

import dataclasses

from endistill_jax.checkpoints.fingerprint import check_facts
from endistill_jax.checkpoints.models import find_run
from endistill_jax.checkpoints.reading import Facts, read_facts_of_step
from endistill_jax.train.best import Best
from endistill_jax.train.training import CONTENTS, Training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    """What a run found that came to its end.

    Attributes:
        best: the best evaluation by the metric of `Run.keep_best`; without one, the last.
        tokens: real tokens read, inputs and targets.
        seconds: spent in training steps, over all attempts.
    """

    best: Best
    tokens: int
    seconds: float


def has_ended(model_dir: str) -> bool:
    """Whether the run in a folder, whichever it was, came to its end."""
    return is_finished(last_facts(model_dir)[1])


def is_finished(facts: Facts) -> bool:
    """Whether the facts of a run's last checkpoint, if there are any, tell that it came to its end."""
    return bool(facts.get("progress", {}).get("finished"))


def finished(training: Training) -> Finished | None:
    """What a run that came to its end found; None if it did not.

    Raises:
        UserError: if it was another run.
    """
    step, facts = last_facts(training.model_dir)
    if not is_finished(facts):
        return None
    check_same_run(training, step, facts)
    return what_was_found(facts)


def what_was_found(facts: Facts) -> Finished:
    """What the facts of a finished run's last step tell."""
    progress = facts["progress"]
    best = Best()
    best.restore(progress["best"])
    return Finished(best=best, tokens=progress["tokens"], seconds=progress["seconds"])


def check_same_run(training: Training, step: int, facts: Facts, *, contents: bool = True) -> None:
    """Compares a run with the one that left a checkpoint.

    Args:
        training: the run.
        step: of the checkpoint.
        facts: of the checkpoint.
        contents: compare what the teacher, or the model that is trained further, contains too; reads them.

    Raises:
        UserError: naming every difference.
    """
    shards = training.data.shards or facts["run"]["data"]["shards"]
    training = dataclasses.replace(training, data=dataclasses.replace(training.data, shards=shards))
    current, saved = training.identity() if contents else training.settings(), facts["run"]
    if not contents:
        saved = {name: saved[name] for name in saved if name not in CONTENTS}
    check_facts(saved, current, f"the checkpoint of step {step} in {training.model_dir}")


def last_facts(model_dir: str) -> tuple[int, Facts]:
    """The last step that a run saved, and its facts; 0 and nothing where there is none."""
    found = find_run(model_dir)
    return (0, {}) if found is None else (found[1], read_facts_of_step(str(found[0]), found[1]))
