"""Eight devices on one CPU for the tests in this folder."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator

import pytest

FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # On a busy machine a device may wait long for the others; after 40 s XLA would end the process.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)

# Read when JAX is first used, not when it is imported.
if FLAGS[0] not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
# Warnings of the compiler are wanted; see `compiler_log`.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "1"


def pytest_sessionstart():
    import jax

    assert jax.device_count() == 8, "JAX was used before this folder's settings; run it by itself"


@pytest.fixture(scope="session")
def compiler_log() -> Callable[[], contextlib.AbstractContextManager[list[str]]]:
    """Within `with compiler_log() as lines`, programs are really compiled; then `lines` is what the compiler said."""
    import jax

    shortest = "jax_persistent_cache_min_compile_time_secs"

    @contextlib.contextmanager
    def log() -> Iterator[list[str]]:
        lines: list[str] = []
        usual, terminal = getattr(jax.config, shortest), os.dup(2)
        with tempfile.TemporaryFile("w+") as file:
            os.dup2(file.fileno(), 2)  # the compiler is no Python: it writes to the descriptor
            jax.config.update(shortest, 1e9)  # a program that is kept would be taken from the cache without a word
            try:
                yield lines
            finally:
                jax.config.update(shortest, usual)
                os.dup2(terminal, 2)
                os.close(terminal)
                file.seek(0)
                lines += file.read().splitlines()

    return log
