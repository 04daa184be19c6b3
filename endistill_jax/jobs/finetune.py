"""Fine-tuning of trained models on tasks, evaluated by the tasks' own metrics."""

from collections.abc import Mapping
from typing import Any

from endistill_jax.core.errors import UserError, naming
from endistill_jax.models.family import ModelConfig
from endistill_jax.reports.table import Column, print_results
from endistill_jax.train.experiment import check_folder_names
from endistill_jax.train.finetuning import (
    Finetuning,
    Rows,
    check_runs,
    metric_names,
    open_initial,
    plan_runs,
    prepare_evaluation,
    run_all,
)
from endistill_jax.train.training import describe


def finetune(*, model_dir: str, model: str | ModelConfig, finetuning: Finetuning, dry_run: bool = False) -> Rows | None:
    """Fine-tunes a model on a task, once for every learning rate and seed, and prints its metrics.

    Args:
        model_dir: receives the table and, where there are several runs, a folder `lr_..._seed_...` for each.
        model: "bundled", a Hugging Face T5 folder or hub name, a T5X checkpoint, or the model directory of a run; or
            the shape of a model, which is then trained from scratch.
        finetuning: the task and how to train on it.
        dry_run: print what would be done, and do nothing.

    Returns:
        The rows of the table, one a learning rate, a list of one number a seed where there are several; None after a
        dry run.
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
    print_results(model_dir, rows, f"{name}, {finetuning.data.eval_split}", columns)
    return rows


def downstream(
    *,
    model_dir: str,
    models: Mapping[str, str | ModelConfig],
    tasks: Mapping[str, Finetuning],
    dry_run: bool = False,
) -> Rows | None:
    """Fine-tunes every model on every task, for every learning rate and seed, and prints all metrics in one table.

    Where a task has several learning rates, each model has its best one's: by the mean of `Run.keep_best` over
    seeds.

    Args:
        model_dir: receives the table, and the runs in `<model>/<task>/`.
        models: name -> what to start from; see `finetune`.
        tasks: name -> how to train on it.
        dry_run: print what would be done, and do nothing.

    Returns:
        The rows of the table, one a model, a list of one number a seed where there are several; None after a dry run.
    """
    _check_downstream(models, tasks)
    opened = {}
    for name, model in models.items():
        with naming(f"model {name!r}"):
            opened[name] = open_initial(model)
    planned = {
        (model, task): plan_runs(f"{model_dir}/{model}/{task}", opened[model], how, f"{model}, {task}")
        for task, how in tasks.items()
        for model in models
    }
    for (_, task), trainings in planned.items():
        check_runs(trainings, tasks[task])
    if dry_run:
        print("\n\n".join(f"{model}, {task}\n{describe(each[0])}" for (model, task), each in planned.items()))
        return None
    rows: dict[str, dict[str, Any]] = {model: {"model": model} for model in models}
    evaluations = {
        task: prepare_evaluation(planned[next(iter(models)), task], how) for task, how in tasks.items()
    }  # all before the first is trained, so that mistakes show
    columns: dict[str, Column] = {"parameters": Column(key="parameters", title="parameters", kind="count")}
    for (model, task), trainings in planned.items():
        best = _best(run_all(trainings, evaluations[task]), tasks[task])
        for name in metric_names(best):
            key = f"{task}/{name}"
            rows[model][key] = best[name]
            columns[key] = Column(key=key, title=f"{task}: {name}", kind="number")
        rows[model]["parameters"] = best["parameters"]
        for name in ("learning_rate", "best_step", "seconds", "model"):
            rows[model][f"{task}/{name}"] = best[name]
    table = list(rows.values())
    splits = ", ".join(dict.fromkeys(how.data.eval_split for how in tasks.values()))
    print_results(model_dir, table, f"Fine-tuned, {splits}", (Column(key="model", title="model"), *columns.values()))
    return table


def _check_downstream(models: Mapping[str, Any], tasks: Mapping[str, Finetuning]) -> None:
    for name, given in (("models", models), ("tasks", tasks)):
        if not given:
            raise UserError(f"downstream.{name} is empty; give at least one, by name")
        check_folder_names(given, f"downstream.{name}")
    for name, how in tasks.items():
        if len(how.learning_rates) > 1 and how.run.keep_best is None:
            raise UserError(f"task {name} has several learning_rates; set Run.keep_best, by which one is chosen")


def _best(rows: Rows, how: Finetuning) -> dict[str, Any]:
    """The row of the best learning rate; of equals the first."""
    if len(rows) == 1:
        return rows[0]

    def mean(row: dict[str, Any]) -> float:
        values = row[how.run.keep_best]
        return sum(values) / len(values) if isinstance(values, list) else values

    return min(rows, key=mean) if how.run.best_mode == "min" else max(rows, key=mean)
