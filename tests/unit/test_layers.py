"""The layers: experiments -> {mbrl.agents, world_models, planners} -> mbrl core -> libraries.

Read from the source with ``ast``, so that an import inside a function counts too.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("mbrl", "world_models", "planners", "experiments", "examples", "benchmarks", "tests")
ENTRY_POINTS = (
    "mbrl.train",
    "mbrl.__main__",
    "mbrl.finished",
)  # they wire parts together, like an experiment

# Who may not import what. A name stands for itself and everything below it.
FORBIDDEN = {
    "mbrl": ("world_models", "planners", "experiments", "benchmarks", "tests"),
    "world_models": ("mbrl.agents", "planners", "experiments", "benchmarks", "tests"),
    "planners": ("mbrl.agents", "world_models", "experiments", "benchmarks", "tests"),
    "experiments": ("experiments", "benchmarks", "tests"),
    "examples": ("experiments", "benchmarks", "tests"),
    "benchmarks": ("experiments", "tests"),
    "tests": ("experiments",),
}


def below(module: str, parents: tuple[str, ...]) -> bool:
    return any(module == p or module.startswith(p + ".") for p in parents)


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Every module that ``source`` imports, in full; ``from a import b`` counts as ``a`` and ``a.b``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__"):
                found.add(str(node.args[0].value))
    return found


def violations(source: str, module: str, is_package: bool = False) -> set[str]:
    """The imports of ``module`` that break a layer."""
    forbidden = FORBIDDEN[module.split(".")[0]]
    if below(module, ("mbrl",)) and not below(module, ("mbrl.agents", *ENTRY_POINTS)):
        forbidden += ("mbrl.agents",)
    return {name for name in imports(source, module, is_package) if below(name, forbidden)}


FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def test_layers():
    broken = {}
    for path in FILES:
        relative = path.relative_to(ROOT)
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        if bad := violations(path.read_text(), module, path.name == "__init__.py"):
            broken[str(relative)] = sorted(bad)
    assert not broken


def test_no_file_reaches_outside_the_repository():
    outside = "../" + "shared"
    assert [str(path) for path in FILES if outside in path.read_text()] == []


def test_files_are_found():
    assert ROOT / "mbrl" / "types.py" in FILES


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mbrl.losses", "import world_models"),
        ("mbrl.losses", "from world_models.rssm import make"),
        ("mbrl.agents.dreamer", "def make():\n    from planners import mppi"),
        ("mbrl.run", "importlib.import_module('world_models.rssm')"),
        ("mbrl.losses", "from mbrl.agents import dreamer"),
        ("mbrl.losses", "from mbrl import agents"),
        ("mbrl.losses", "from .agents import dreamer"),
        ("mbrl.envs.pool", "from ..agents.dreamer import make"),
        ("world_models.rssm", "import mbrl.agents.dreamer"),
        ("world_models.rssm", "from planners import mppi"),
        ("planners.mppi", "import world_models.rssm"),
        ("tests.unit.test_x", "from experiments.dreamer_dmc import main"),
        ("experiments.planning", "from experiments import dreamer_dmc"),
    ],
)
def test_a_broken_layer_is_seen(module, source):
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mbrl.losses", "import jax\nfrom mbrl.types import Array"),
        ("mbrl.agents.dreamer", "from mbrl.agents import common"),
        ("mbrl.train", "from mbrl.agents import dreamer"),
        ("mbrl.run", "factory = 'world_models.rssm:make'"),
        ("world_models.rssm", "from mbrl import types"),
        ("experiments.dreamer_dmc", "import mbrl.agents.dreamer, world_models.rssm, planners"),
    ],
)
def test_an_allowed_import_passes(module, source):
    assert not violations(source, module)


def test_relative_import_in_a_package():
    assert violations("from . import agents", "mbrl", is_package=True) == {"mbrl.agents"}
