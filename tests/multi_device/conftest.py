"""Eight devices on one CPU for the tests in this folder."""

import os

FLAG = "--xla_force_host_platform_device_count=8"

# Read when JAX is first used, not when it is imported.
if FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
# Programs for eight devices take long to compile and are run once.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


def pytest_sessionstart():
    import jax

    assert jax.device_count() == 8, "JAX was used before this folder's settings; run it by itself"
