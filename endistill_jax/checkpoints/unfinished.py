"""Cleanup of a checkpoint directory before a run resumes: sets incomplete steps aside."""

import logging

import jax
from etils import epath
from jax.experimental import multihost_utils

from endistill_jax.checkpoints.reading import finished_steps
from endistill_jax.storage import is_remote

_LOGGER = logging.getLogger(__name__)
# What Orbax writes last on a bucket, where no folder can be renamed at once.
_COMMITTED = "commit_success.txt"


def leave_whole_ones(directory: epath.Path) -> None:
    """Sets aside step folders that a kill left incomplete: Orbax would take them for complete ones.

    Every process must call it, before Orbax looks at the directory.
    """
    if jax.process_index() == 0 and directory.is_dir():
        finished = finished_steps(directory)
        for folder in directory.iterdir():
            if folder.name.isdecimal() and folder.is_dir() and int(folder.name) not in finished:
                aside = folder.with_name(f"{folder.name}.unfinished")
                _LOGGER.warning("%s is not a whole checkpoint; it is now %s and is not used", folder, aside)
                if aside.exists():
                    aside.rmtree()
                folder.rename(aside)
        if is_remote(directory):
            for step in finished:
                _mark_whole(directory / str(step))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("endistill_jax:set_aside_unfinished")


def _mark_whole(folder: epath.Path) -> None:
    """Marks a complete checkpoint that was copied to a bucket: Orbax would remove it as incomplete."""
    for part in (*(each for each in folder.iterdir() if each.is_dir()), folder):
        if not (part / _COMMITTED).exists():
            (part / _COMMITTED).write_text("copied")
