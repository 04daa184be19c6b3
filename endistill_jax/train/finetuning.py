"""Fine-tuning as experiments: one training for every learning rate and seed."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from endistill_jax.checkpoints.models import CHECKPOINTS, TrainedModel, open_model, print_notes
from endistill_jax.core.errors import DTYPES, UserError, as_tuple, is_positive, whole_numbers
from endistill_jax.evaluation import Evaluation
from endistill_jax.evaluation.task_metrics import check_task_metrics, prepare_task_metrics, scoring_spec
from endistill_jax.models.family import ModelConfig, abstract_params, count_params
from endistill_jax.models.generation.generation import Decoding
from endistill_jax.objectives import presets
from endistill_jax.reports.table import merge_seeds
from endistill_jax.train.experiment import Data, Experiment, Run
from endistill_jax.train.optimizer import OptimizerConfig
from endistill_jax.train.run import train
from endistill_jax.train.training import Training, finished

Rows = list[dict[str, Any]]

_OTHERS = ("learning_rate", "parameters", "best_step", "train_tokens", "seconds", "model")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetuning:
    """How a model is fine-tuned on a task and evaluated.

    Attributes:
        data: the task or mixture; the model is evaluated on its `eval_split`.
        optimizer: optimizer and learning-rate schedule.
        run: length, mesh, logging and checkpoints. `keep_best` is a metric of the task, of a mixture `task/metric` or
            `mean`; metrics are then those of the best evaluation.
        learning_rates: peak learning rates to sweep; if empty, the optimizer's own.
        seeds: one run each for every learning rate; if empty, the run's own. They set data order and dropout.
        dropout_rate: during training.
        dtype: float32 or bfloat16, of the computations; parameters are float32.
        z_loss: coefficient of the squared log normalizer.
        scored_by: "generation"; "rank" takes the most likely label where a task has labels; or "both".
        decoding: how text is generated; None for greedy decoding of up to `targets_length` tokens.
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


def open_initial(model: str | ModelConfig) -> TrainedModel | ModelConfig:
    """The model to fine-tune, its parameters in float32; a shape is returned unchanged."""
    if not isinstance(model, str):
        return model
    opened = open_model(model)
    print_notes(opened)
    return opened


def plan_runs(
    model_dir: str, model: TrainedModel | ModelConfig, finetuning: Finetuning, label: str = ""
) -> list[Training]:
    """One training per learning rate and seed, learning rates first; a single one uses `model_dir` itself."""
    initial = model if isinstance(model, TrainedModel) else None
    student = dataclasses.replace(
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
            experiment=Experiment(
                student=student,
                objective=presets.scratch(z_loss=finetuning.z_loss),
                data=finetuning.data,
                optimizer=dataclasses.replace(finetuning.optimizer, learning_rate=rate),
                run=dataclasses.replace(finetuning.run, seed=seed),
                initial_checkpoint=None if initial is None else initial.source,
            ),
            initial=initial,
            scoring=scoring_spec(finetuning.data, finetuning.scored_by, finetuning.decoding),
            label=" ".join(filter(None, (label or "finetune", f"lr {rate:g} seed {seed}" if several else ""))),
        )
        for rate in rates
        for seed in seeds
    ]


def check_runs(trainings: Sequence[Training], finetuning: Finetuning) -> None:
    """Validates settings early, without reading any example."""
    folders = [training.model_dir for training in trainings]
    if len(set(folders)) < len(folders):
        raise UserError("Finetuning.learning_rates or seeds has a value twice; give each once")
    for training in trainings:
        training.check()
        training.check_saved()
    if finetuning.decoding is not None:
        finetuning.decoding.validate(trainings[0].student)
    check_task_metrics(finetuning.data, finetuning.scored_by)


def prepare_evaluation(trainings: Sequence[Training], finetuning: Finetuning) -> Evaluation:
    """The evaluator of the runs; refuses a split without examples, or a `keep_best` that is no metric of the task."""
    evaluation = prepare_task_metrics(
        finetuning.data, trainings[0].mesh(), scored_by=finetuning.scored_by, decoding=finetuning.decoding
    )
    evaluation.check_metric(finetuning.run.keep_best)
    return evaluation


def run_all(trainings: Sequence[Training], evaluation: Evaluation) -> Rows:
    """Trains them one after another; returns a row per learning rate, with the metrics of all its seeds."""
    rows: dict[float, Rows] = {}
    for training in trainings:
        rows.setdefault(training.experiment.optimizer.learning_rate, []).append(_row(training, evaluation))
    return [merge_seeds(each) | {"learning_rate": rate} for rate, each in rows.items()]


def metric_names(row: dict[str, Any]) -> list[str]:
    """Which of a row's keys are metrics."""
    return [key for key in row if key not in _OTHERS]


def _row(training: Training, evaluation: Evaluation) -> dict[str, Any]:
    found = finished(training) or train(training, evaluation)
    return {
        "parameters": count_params(abstract_params(training.student)),
        **found.best.metrics,
        "best_step": float(found.best.step),
        "train_tokens": float(found.tokens),
        "seconds": found.seconds,
        "model": f"{training.model_dir}/{CHECKPOINTS}/{found.best.step}",
    }
