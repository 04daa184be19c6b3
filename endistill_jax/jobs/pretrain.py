"""Pretraining from scratch: the language-model loss alone, no teacher."""

from endistill_jax.evaluation.held_out import prepare_held_out
from endistill_jax.jobs.plan import PlanOptions, plan_training
from endistill_jax.models.t5.config import T5Config
from endistill_jax.objectives import Path
from endistill_jax.reports.results import model_row, reference_rows, tell
from endistill_jax.train.description import describe
from endistill_jax.train.optimizer import OptimizerConfig
from endistill_jax.train.run import TrainingResult, train
from endistill_jax.train.experiment import Data, Run
from endistill_jax.train.training import Training


def pretrain(
    *,
    model_dir: str,
    model: T5Config,
    data: Data,
    optimizer: OptimizerConfig,
    run: Run,
    z_loss: float = 0.0,
    dry_run: bool = False,
    plan: PlanOptions | None = None,
) -> TrainingResult | None:
    """Trains a model on a task's targets, from scratch or from the last checkpoint in `model_dir`.

    Args:
        model_dir: receives checkpoints, metrics and the final table.
        model: shape of the model.
        data: what it reads.
        optimizer: how it is updated.
        run: how long, on which mesh, what is kept.
        z_loss: coefficient of the squared log normaliser.
        dry_run: print what would be done, and do nothing.
        plan: compile the step for chips that are not here, tell what it needs there, and do nothing else.

    Returns:
        The trained parameters and their held-out figures; None after a dry run or a plan.

    Raises:
        UserError: for settings that do not fit, before anything is created.
        Stopped: when a signal asked the run to stop; what was done is saved.
    """
    path = Path(lm_weight=1.0, z_loss=z_loss)
    if plan is not None:
        plan_training(plan, student=model, teacher=None, path=path, data=data, optimizer=optimizer, run=run)
        return None
    training = Training(
        model_dir=model_dir,
        config=model,
        path=path,
        data=data,
        optimizer=optimizer,
        run=run,
        label="pretrain",
    )
    training.check()
    if dry_run:
        print(describe(training))
        return None
    result = train(training, prepare_held_out(data, training.mesh()))
    rows = [model_row("model", model, result.report, result.tokens, result.seconds), *reference_rows(result.report)]
    tell(model_dir, rows, "Held-out denoising, nats a token")
    return result
