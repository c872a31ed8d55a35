"""The example of docs/world_models.md runs as it is printed there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mbrl.types import ArraySpec, EnvSpec, Trajectory

PAGE = Path(__file__).parents[2] / "docs" / "world_models.md"
T, B = 5, 2


def test_world_model_in_one_file(tmp_path, monkeypatch):
    """The file alone: a sequence with an episode start in it equals its steps."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    (tmp_path / "leaky.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    leaky = importlib.import_module("leaky")
    sizes = dict(stoch=2, classes=3, units=8, hidden=8, width=8, encoder_layers=1, decoder_layers=1)
    spec = EnvSpec("docs", {"x": ArraySpec((3,))}, ArraySpec((1,)))
    model = leaky.make(leaky.LeakyConfig(**sizes, bins=15, bin_limit=4.0), spec)

    @jax.jit
    def both(params, traj, keys):
        def body(state, row):
            x, action, is_first, key = row
            state = model.observe_step(params, state, action, {"x": x}, is_first, key)
            return state, model.features(params, state)

        fresh = model.init_state(params, B)
        rows = traj.obs["x"], traj.action, traj.is_first, keys
        return model.observe(params, fresh, traj, keys).features, jax.lax.scan(body, fresh, rows)[1]

    rng = np.random.default_rng(0)
    x, action = rng.normal(size=(T, B, 3)), rng.normal(size=(T, B, 1))
    first = jnp.zeros((T, B), bool).at[0].set(True).at[2, 1].set(True)
    no, zeros = jnp.zeros((T, B), bool), jnp.zeros((T, B))
    traj = Trajectory({"x": jnp.float32(x)}, jnp.float32(action), zeros, first, no, no)
    params = jax.jit(model.init)(jax.random.key(0))
    sequence, steps = both(params, traj, jax.random.split(jax.random.key(1), T))
    np.testing.assert_allclose(sequence, steps, rtol=1e-5, atol=1e-5)
