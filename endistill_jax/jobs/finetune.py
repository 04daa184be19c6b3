"""Fine-tuning: a trained model learns a task, and is judged by the task's own metrics."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from endistill_jax.checkpoints.models import CHECKPOINTS, DTYPES, TrainedModel, open_model, tell_notes
from endistill_jax.core.errors import UserError
from endistill_jax.core.settings import as_tuple, is_positive, whole_numbers
from endistill_jax.evaluation.report import Evaluation
from endistill_jax.evaluation.task_metrics import check_task_metrics, prepare_task_metrics, scoring_facts
from endistill_jax.models.family import abstract_params, count_params
from endistill_jax.models.generation.generation import Decoding
from endistill_jax.models.t5.config import T5Config
from endistill_jax.objectives import Path
from endistill_jax.reports.results import merge_seeds, tell
from endistill_jax.reports.table import Column
from endistill_jax.train.description import describe
from endistill_jax.train.finished import finished
from endistill_jax.train.optimizer import OptimizerConfig
from endistill_jax.train.run import train
from endistill_jax.train.experiment import Data, Run
from endistill_jax.train.training import Training

Rows = list[dict[str, Any]]

_OTHERS = ("learning_rate", "parameters", "best_step", "train_tokens", "seconds", "model")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetuning:
    """How a model is fine-tuned on a task and judged.

    Attributes:
        data: the task or mixture; its `eval_split` is what the model is judged on.
        optimizer: how the model is updated.
        run: how long, on which mesh, what is kept. `keep_best` is a metric of the task, of a mixture `task/metric` or
            `mean`; figures are then those of the best evaluation.
        learning_rates: peaks of the schedule to compare, a run for each; none for the optimizer's own alone.
        seeds: a run for each at every learning rate; none for the run's own alone. They decide order and dropout.
        dropout_rate: while it is trained.
        dtype: float32 or bfloat16: type of the computations; parameters are float32.
        z_loss: coefficient of the squared log normaliser.
        scored_by: "generation"; "rank" takes the likeliest label where a task has labels; or "both".
        decoding: how text is generated; None for the likeliest token, up to `targets_length` of them.
    """

    data: Data
    optimizer: OptimizerConfig
    run: Run
    learning_rates: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()
    dropout_rate: float = 0.1
    dtype: str = "float32"
    z_loss: float = 0.0
    scored_by: str = "generation"
    decoding: Decoding | None = None

    def __post_init__(self):
        rates = as_tuple(
            self.learning_rates, "Finetuning.learning_rates", "numbers above 0, such as (1e-3,)", is_positive
        )
        object.__setattr__(self, "learning_rates", rates)
        object.__setattr__(self, "seeds", whole_numbers(self.seeds, "Finetuning.seeds"))
        if self.dtype not in DTYPES:
            raise UserError(f"Finetuning.dtype is {self.dtype!r}; choose one of {', '.join(DTYPES)}")


def finetune(*, model_dir: str, model: str | T5Config, finetuning: Finetuning, dry_run: bool = False) -> Rows | None:
    """Trains a model further on a task's targets, once for every learning rate and seed, and tells its metrics.

    Args:
        model_dir: receives the table and, where there are several runs, a folder `lr_..._seed_...` for each.
        model: "bundled", a Hugging Face T5 folder or hub name, a T5X checkpoint, or the model directory of a run; or
            the shape of a model, which is then trained from scratch.
        finetuning: the task and how it is learned.
        dry_run: print what would be done, and do nothing.

    Returns:
        The rows of the table, one a learning rate, a list of one number a seed where there are several; None after a
        dry run.

    Raises:
        UserError: for settings that do not fit, before anything is created.
        Stopped: when a signal asked the run to stop; what was done is saved, and the same command goes on.
    """
    trainings = plan_runs(model_dir, open_initial(model), finetuning)
    check_runs(trainings, finetuning)
    if dry_run:
        print("\n\n".join(describe(training) for training in trainings))
        return None
    evaluation = prepare_evaluation(trainings, finetuning)
    rows = run_all(trainings, evaluation)
    name = trainings[0].task().name
    columns = (
        Column(key="learning_rate", title="learning rate", kind="number"),
        Column(key="parameters", title="parameters", kind="count"),
        *(Column(key=name, title=name, kind="number") for name in metric_names(rows[0])),
        Column(key="best_step", title="step", kind="count"),
        Column(key="train_tokens", title="tokens seen", kind="count"),
        Column(key="seconds", title="training", kind="seconds"),
    )
    tell(model_dir, rows, f"{name}, {finetuning.data.eval_split}", columns)
    return rows


def open_initial(model: str | T5Config) -> TrainedModel | T5Config:
    """The model that is trained further, its parameters in float32; a shape is returned as it is."""
    if isinstance(model, T5Config):
        return model
    opened = open_model(model)
    tell_notes(opened)
    return opened


def plan_runs(
    model_dir: str, model: TrainedModel | T5Config, finetuning: Finetuning, label: str = ""
) -> list[Training]:
    """A training for every learning rate and seed, learning rates first; one alone has `model_dir` to itself."""
    initial = model if isinstance(model, TrainedModel) else None
    config = dataclasses.replace(
        model if initial is None else initial.config,
        dropout_rate=finetuning.dropout_rate,
        dtype=finetuning.dtype,
    )
    rates = finetuning.learning_rates or (finetuning.optimizer.learning_rate,)
    seeds = finetuning.seeds or (finetuning.run.seed,)
    several = len(rates) * len(seeds) > 1
    return [
        Training(
            model_dir=f"{model_dir}/lr_{rate:g}_seed_{seed}" if several else model_dir,
            config=config,
            path=Path(lm_weight=1.0, z_loss=finetuning.z_loss),
            data=finetuning.data,
            optimizer=dataclasses.replace(finetuning.optimizer, learning_rate=rate),
            run=dataclasses.replace(finetuning.run, seed=seed),
            initial=initial,
            scoring=scoring_facts(finetuning.data, finetuning.scored_by, finetuning.decoding),
            label=" ".join(filter(None, (label or "finetune", f"lr {rate:g} seed {seed}" if several else ""))),
        )
        for rate in rates
        for seed in seeds
    ]


def check_runs(trainings: Sequence[Training], finetuning: Finetuning) -> None:
    """Finds what would go wrong later; reads no example.

    Raises:
        UserError: naming the setting and what would be right.
    """
    folders = [training.model_dir for training in trainings]
    if len(set(folders)) < len(folders):
        raise UserError("Finetuning.learning_rates or seeds has a value twice; give each once")
    for training in trainings:
        training.check()
    if finetuning.decoding is not None:
        finetuning.decoding.validate(trainings[0].config)
    check_task_metrics(finetuning.data, finetuning.scored_by)


def prepare_evaluation(trainings: Sequence[Training], finetuning: Finetuning) -> Evaluation:
    """What judges the runs.

    Raises:
        UserError: a split without examples, or no metric of the name of `Run.keep_best`.
    """
    evaluation = prepare_task_metrics(
        finetuning.data, trainings[0].mesh(), scored_by=finetuning.scored_by, decoding=finetuning.decoding
    )
    evaluation.check_metric(finetuning.run.keep_best)
    return evaluation


def run_all(trainings: Sequence[Training], evaluation: Evaluation) -> Rows:
    """Trains one after the other; a row for every learning rate, with the numbers of all its seeds."""
    rows: dict[float, Rows] = {}
    for training in trainings:
        rows.setdefault(training.optimizer.learning_rate, []).append(_row(training, evaluation))
    return [merge_seeds(each) | {"learning_rate": rate} for rate, each in rows.items()]


def metric_names(row: dict[str, Any]) -> list[str]:
    """Which of a row's keys are metrics."""
    return [key for key in row if key not in _OTHERS]


def _row(training: Training, evaluation: Evaluation) -> dict[str, Any]:
    found = finished(training) or train(training, evaluation)
    return {
        "parameters": count_params(abstract_params(training.config)),
        **found.best.metrics,
        "best_step": float(found.best.step),
        "train_tokens": float(found.tokens),
        "seconds": found.seconds,
        "model": f"{training.model_dir}/{CHECKPOINTS}/{found.best.step}",
    }
