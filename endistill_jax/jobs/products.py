"""What is kept of a finished run that nothing but its parameters is needed of: a model directory within its folder.

    <model_dir>/product/checkpoints/<step>    parameters and facts, without optimizer state or data positions
    <model_dir>/product/tokenizer/

The product is written, read back and compared before any checkpoint of the run is removed, so that whenever the process
ends one of the two is whole. Everything that opens the run's model directory finds the product.
"""

import math

import jax

from endistill_jax.agreement import agree
from endistill_jax.checkpoints.manager import Checkpointer
from endistill_jax.checkpoints.reading import finished_steps
from endistill_jax.errors import UserError
from endistill_jax.jobs.finished import last_facts
from endistill_jax.jobs.models import CHECKPOINTS, PRODUCT, keep_tokenizer, open_model
from endistill_jax.jobs.training import Training
from endistill_jax.storage import stored_path


def keep_product(training: Training) -> None:
    """Leaves of a finished run's checkpoints the last step's parameters; goes on where it was interrupted.

    Raises:
        UserError: a checkpoint that cannot be read, or a product that does not read back as it was written; the
            checkpoints are then still there.
    """
    checkpoints = stored_path(training.model_dir) / CHECKPOINTS
    if not finished_steps(f"{training.model_dir}/{PRODUCT}/{CHECKPOINTS}"):
        _write(training)
    agree("product", {"checkpoints": checkpoints.exists()})
    if jax.process_index() == 0 and checkpoints.exists():
        checkpoints.rmtree()
    agree("product alone", {})


def product_fingerprint(model_dir: str) -> str | None:
    """The fingerprint of a run's product, as its facts tell it; None where the run has its checkpoints."""
    return last_facts(model_dir)[1].get(PRODUCT, {}).get("fingerprint")


def check_not_damaged(model_dir: str) -> None:
    """A product that is no longer whole is no reason to begin anew.

    Raises:
        UserError: for a folder that has parts of a product, and nothing to make it from.
    """
    product = stored_path(model_dir) / PRODUCT
    if product.exists() and not last_facts(model_dir)[1]:
        raise UserError(f"{product} is not whole")


def _write(training: Training) -> None:
    folder = f"{training.model_dir}/{PRODUCT}"
    trained = open_model(training.model_dir)
    params = trained.load_on(training.mesh())
    facts = trained.facts | {PRODUCT: {"fingerprint": trained.fingerprint}}
    if jax.process_index() == 0 and training.vocabulary_file() is not None:
        keep_tokenizer(folder, training.vocabulary_file())
    largest = math.ceil(max(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e9)
    with Checkpointer(f"{folder}/{CHECKPOINTS}", keep_last=1, concurrent_gigabytes=largest) as checkpointer:
        checkpointer.save(trained.step, {"params": params}, {}, facts, force=True)
    trained.release()
    del params
    written = open_model(folder)
    written.load_on(training.mesh())
    if written.fingerprint != trained.fingerprint:
        raise UserError(f"{folder} does not read back as it was written; remove it, the checkpoints are still there")
