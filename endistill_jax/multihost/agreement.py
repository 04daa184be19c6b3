"""Checks that all hosts run with the same settings before anything is computed; on a mismatch all of them stop.

Values are exchanged through the key-value store of JAX's coordination service, not through devices, so a host with
different shapes, or one that never arrives, cannot make the others hang.
"""

import glob
import hashlib
import importlib.metadata
import itertools
import json
import pathlib
import platform
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from endistill_jax import __version__
from endistill_jax.checkpoints.manifest import flattened
from endistill_jax.core.errors import HostMissing, UserError
from endistill_jax.multihost.initialize import client, process_count, process_index

# Timeout for the other hosts, which may load a model more slowly.
AGREE_SECONDS = 1800
# Packages whose version affects results or the order of batches.
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "seqio", "tensorflow", "sentencepiece")

_topics = itertools.count()


def agree(topic: str, facts: Mapping[str, Any], seconds: float = AGREE_SECONDS) -> None:
    """Blocks until every process has called this with the same facts; a no-op in a single process.

    Every process must make its calls in the same order.

    Args:
        topic: what the facts are about, for messages.
        facts: plain values in nested dictionaries.
        seconds: how long to wait for the others.

    Raises:
        UserError: on every process, naming each difference and which processes have which value.
        HostMissing: naming a process that did not report in time.
    """
    if process_count() == 1:
        return
    prefix = f"endistill/{next(_topics)}/{topic}"
    client().key_value_set(f"{prefix}/{process_index()}", json.dumps(flattened(facts)))
    until = time.monotonic() + seconds
    reported = []
    for index in range(process_count()):
        left = max(1, round(1000 * (until - time.monotonic())))
        try:
            reported.append(json.loads(client().blocking_key_value_get(f"{prefix}/{index}", left)))
        except jax.errors.JaxRuntimeError as error:
            raise HostMissing(
                f"process {index} of {process_count()} sent no {topic} within {seconds:.0f} s; see its output"
            ) from error
    if differences := describe_differences(reported):
        raise UserError(f"the hosts disagree on their {topic}: {'; '.join(differences)}")


def describe_differences(reported: Sequence[Mapping[str, str]]) -> list[str]:
    """One phrase per fact that differs between processes: each value, and which processes have it.

    Args:
        reported: facts of each process in order, values as strings.
    """
    phrases = []
    for name in sorted(set().union(*reported)):
        processes: dict[str, list[int]] = {}
        for index, facts in enumerate(reported):
            processes.setdefault(facts.get(name, "absent"), []).append(index)
        if len(processes) > 1:
            values = (f"{_shortened(value)} on {_named(indices)}" for value, indices in processes.items())
            phrases.append(f"{name} is {' and '.join(values)}")
    return phrases


def _shortened(value: str, length: int = 120) -> str:
    return value if len(value) <= length else f"{value[:length]}..."


def _named(indices: Sequence[int]) -> str:
    shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    return f"process {shown}" if len(indices) == 1 else f"processes {shown}"


def agree_on_folder(folder: str) -> None:
    """Checks that all processes see the same folder, rather than a local one of the same name each.

    Raises:
        UserError: naming the processes that see a different one.
    """
    if process_count() == 1:
        return
    mark = epath.Path(folder).expanduser() / ".seen_by_all_hosts"
    if process_index() == 0:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(uuid.uuid4().hex)
    agree("start", {})  # barrier: the mark is written
    try:
        agree("folder, which must be one that all of them share", {folder: mark.read_text() if mark.exists() else None})
    finally:
        if process_index() == 0:
            mark.unlink(missing_ok=True)


def code_facts() -> dict[str, Any]:
    """Versions of this package (with a digest of its source), Python, and the packages that affect results."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "endistill_jax": {"version": __version__, "source": _source_digest()},
        "python": platform.python_version(),
        "packages": versions,
    }


def _source_digest() -> str:
    """SHA-256 of every Python file of this package with its name; in a checkout some are behind links."""
    package = pathlib.Path(__file__).parent.parent
    digest = hashlib.sha256()
    for name in sorted(glob.glob("**/*.py", root_dir=package, recursive=True)):
        content = (package / name).read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()
