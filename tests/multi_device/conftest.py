"""Eight devices on one CPU for the tests in this folder."""

import os

FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # On a busy machine a device may wait long for the others; after 40 s XLA would end the process.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)

# Read when JAX is first used, not when it is imported.
if FLAGS[0] not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
# Programs for eight devices take long to compile and are run once.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


def pytest_sessionstart():
    import jax

    assert jax.device_count() == 8, "JAX was used before this folder's settings; run it by itself"
