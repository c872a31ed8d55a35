"""The site builds without a warning; the example of docs/world_models.md is a world model."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl.config import field_docs
from mbrl.types import ArraySpec, EnvSpec, Trajectory

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "world_models.md"
T, B = 5, 2


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The whole site, built as `make docs` does: strict, so a broken link or anchor is an error."""
    pytest.importorskip("material", reason="the extra docs is not installed")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    logging.getLogger("mkdocs").setLevel(logging.WARNING)
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    return folder


def test_every_page_is_in_the_navigation(site):
    nav = (ROOT / "mkdocs.yml").read_text()
    missing = [page.name for page in ROOT.glob("docs/*.md") if f": {page.name}\n" not in nav]
    assert not missing, f"mkdocs.yml must name them under nav: {missing}"


def test_nothing_is_loaded_from_the_network(site):
    """Links may lead elsewhere; scripts, styles, fonts and pictures are files of the site."""
    for page in site.rglob("*.html"):
        text = page.read_text()
        found = re.findall(r"<(?:script|img|iframe)[^>]*src=\W?(?:https?:)?//[^>]*>", text)
        found += re.findall(r"<link[^>]*(?:stylesheet|preconnect|icon)[^>]*href=\W?https?:[^>]*>", text)
        found += re.findall(r"class=.?mermaid", text)  # the theme would fetch its renderer
        assert not found, (page.name, found[:3])


def test_every_field_of_every_config_is_explained(site):
    """With a docstring, and a row on the configuration page."""
    page = (site / "configuration.html").read_text()
    found = {config for _, config in sys.modules["docs/build.py"].configs()}
    assert len(found) > 15
    for config in found:
        docs = field_docs(config)
        for field in dataclasses.fields(config):
            assert field.name in docs or dataclasses.is_dataclass(field.default_factory), (config, field.name)
            assert f"<code>{field.name}</code>" in page


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
