"""Params-only checkpoints of finished runs: a model directory within the run's folder.

    <model_dir>/product/checkpoints/<step>    parameters and manifest, without optimizer state or data positions
    <model_dir>/product/tokenizer/

The params-only checkpoint is written, read back and compared before any checkpoint of the run is removed, at every
start that finds checkpoints next to it, so one of the two is complete whenever the process ends. Everything that opens
the run's model directory finds it.
"""

import math

import jax

from endistill_jax.checkpoints.manager import Checkpointer, finished_steps
from endistill_jax.checkpoints.models import CHECKPOINTS, PRODUCT, keep_tokenizer, open_model
from endistill_jax.core.errors import UserError
from endistill_jax.multihost import agree
from endistill_jax.storage import stored_path
from endistill_jax.train.training import Training, last_manifest


def keep_product(training: Training) -> None:
    """Reduces a finished run's checkpoints to the last step's parameters; resumes where it was interrupted.

    Raises:
        UserError: a checkpoint cannot be read, or the copy differs from it; nothing was removed.
    """
    checkpoints = stored_path(training.model_dir) / CHECKPOINTS
    written = bool(finished_steps(f"{_folder(training.model_dir)}/{CHECKPOINTS}"))
    has_checkpoints = checkpoints.exists()
    agree("product", {"written": written, "checkpoints": has_checkpoints})
    if not written:
        _write(training)
    if has_checkpoints:
        _compare(training)
        agree("compared product", {})
        if jax.process_index() == 0:
            checkpoints.rmtree()
    agree("product alone", {})


def remedy(model_dir: str) -> str | None:
    """Advice for a damaged product; None if there is none, or no checkpoint next to it."""
    product = stored_path(_folder(model_dir))
    if not (product.exists() and finished_steps(f"{model_dir}/{CHECKPOINTS}")):
        return None
    return f"remove {product}; the same command then goes on from the checkpoints beside it"


def product_fingerprint(model_dir: str) -> str | None:
    """The fingerprint of a run's product, from its manifest; None if the run still has its checkpoints."""
    return last_manifest(model_dir)[1].get(PRODUCT, {}).get("fingerprint")


def check_not_damaged(model_dir: str) -> None:
    """Refuses to start from scratch because a product is incomplete.

    Raises:
        UserError: the folder has parts of a product, and no checkpoint to make it from.
    """
    product = stored_path(model_dir) / PRODUCT
    if product.exists() and not last_manifest(model_dir)[1]:
        raise UserError(f"{product} is not whole")


def _folder(model_dir: str) -> str:
    return f"{model_dir}/{PRODUCT}"


def _write(training: Training) -> None:
    folder = _folder(training.model_dir)
    trained = open_model(training.model_dir)
    params = trained.load_on(training.mesh())
    manifest = trained.manifest | {PRODUCT: {"fingerprint": trained.fingerprint}}
    if jax.process_index() == 0 and training.vocabulary_file() is not None:
        keep_tokenizer(folder, training.vocabulary_file())
    largest = math.ceil(max(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e9)
    with Checkpointer(f"{folder}/{CHECKPOINTS}", keep_last=1, concurrent_gigabytes=largest) as checkpointer:
        checkpointer.save(trained.step, {"params": params}, {}, manifest, force=True)


def _compare(training: Training) -> None:
    """Reads a product and compares it with the fingerprint in its manifest."""
    folder = _folder(training.model_dir)
    try:
        product = open_model(folder)
        product.load_on(training.mesh())
        if product.fingerprint != product_fingerprint(folder):
            raise UserError(f"{folder} does not read back as it was written")
    except UserError as error:
        advice = remedy(training.model_dir) or "bring it back as it was"
        raise UserError(f"{error}; {advice}") from error
