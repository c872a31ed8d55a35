"""Settings that every test shares. They must be in place before jax is imported.

Environment variables, not ``jax.config``: tests that start another process pass them on.
"""

import gc
import os
import sys
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py; its settings would come too late")

_cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mbrl-jax" / "tests"
_settings = {
    "JAX_PLATFORMS": "cpu",
    "MUJOCO_GL": "disable",  # state observations need no renderer, and many machines have none
    # Compiled programs are kept between runs: most of the suite's time is compilation.
    "JAX_COMPILATION_CACHE_DIR": str(_cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
}
for name, value in _settings.items():
    os.environ.setdefault(name, value)

# Two virtual devices, so that sharding over seeds is tested on any machine.
if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    ).strip()

# Annotations of our packages are checked at every call. An int passes as a float (PEP 484).
install_import_hook(
    ["mbrl", "world_models", "planners"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Every compiled program maps some memory, and Linux ends a process with more than 65,530 maps."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()


@pytest.fixture
def strict_numerics():
    """Silent rank promotion is an error while the test runs. For losses, returns and distributions."""
    import jax

    with jax.numpy_rank_promotion("raise"):
        yield
