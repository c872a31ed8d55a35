"""What the pages print works: Python snippets run, commands are understood by their scripts, cheap ones run.

Every snippet sees a folder with a finished run in it, ``runs/my-run``. Words in capitals stand for something.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tyro

import mbrl.__main__
import mbrl.finished
from mbrl.config import check_config
from tests.helpers import TINY, script

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])
STANDS_FOR = {
    "RUN_DIR": "runs/my-run",
    "DIR": "runs/new",
    "NAME": "koopman",
    "TASK": "tmaze",
    "DATA": "my-data",
    "FILE": "my-file",
    "N": "12",
    "U": "100",
    "leaky": "koopman",  # the model that docs/world_models.md adds
}
CHEAP = ("presets", "export", "data", "compare")  # of python -m mbrl


def snippets(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


def commands(page: Path) -> list[str]:
    """Lines of blocks for a shell, of indented blocks, and commands within a sentence; without comments."""
    text = page.read_text()
    blocks = [*snippets(page, "sh"), *snippets(page, "bash")]
    blocks += re.findall(r"^ {4}((?:python|make|pip|pytest) .*(?:\\\n.*)*)", text, re.M)
    blocks += [one.replace("\n", " ") for one in re.findall(r"(?<!`)`(python \w+/[^`]+|make [^`]+)`", text)]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


def of_pages(find):
    return [pytest.param(page, id=page.name) for page in PAGES if find(page)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("snippets")
    script("dreamer_dmc")([*TINY, "--run-dir", str(folder / "runs" / "my-run")])
    for name in ("a1", "b1"):
        shutil.copytree(folder / "runs" / "my-run", folder / "runs" / name)
    for name in (
        "examples",
        "experiments",
        "benchmarks",
        "tests",
        "Makefile",
        "pyproject.toml",
        "constraints.txt",
    ):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.parametrize("page", of_pages(lambda page: snippets(page, "python")))
def test_python(page, folder, tmp_path, monkeypatch):
    """All snippets of a page, one after the other, as a file."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(tmp_path)
    # The run is of an environment without pictures.
    monkeypatch.setattr(mbrl.finished.Finished, "film", lambda run, path: 0.0)
    name = f"snippets_of_{page.stem.lower()}"
    (tmp_path / f"{name}.py").write_text("\n".join(snippets(page, "python")))
    importlib.import_module(name)


@pytest.mark.parametrize("page", of_pages(commands))
def test_commands(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for command in commands(page):
        for word, meaning in STANDS_FOR.items():
            command = re.sub(rf"(?<![\w.\-/]){word}\b", meaning, command)
        check(shlex.split(command.replace(" ...", "")), monkeypatch)


def check(words: list[str], monkeypatch) -> None:
    """Runs a command as far as that costs little. Fails for what nobody understands."""
    # One process has no others to meet.
    words = [word for word in words if word not in ("--distributed", "&")]
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if "&&" in words:
        at = words.index("&&")
        check(words[:at], monkeypatch)
        return check(words[at + 1 :], monkeypatch)
    match words:
        case ["python", "-m", "mbrl", command, *_] if command in CHEAP or "--fast" in words:
            if command == "export":
                shutil.rmtree("my-data", ignore_errors=True)
            mbrl.__main__.main(expanded(words[3:]))
        case ["python", "-m", "mbrl", *flags]:
            parse(monkeypatch, lambda: mbrl.__main__.main(expanded(flags)))
        case ["python", path, *flags] if path.endswith(".py"):
            monkeypatch.setattr(sys, "argv", [path, *expanded(flags)])
            monkeypatch.syspath_prepend(ROOT / Path(path).parent)
            if path.startswith("examples/"):
                assert Path(path).exists() and not flags  # run by tests of their own
            else:
                parse(monkeypatch, lambda: runpy.run_path(path, run_name="__main__"))
        case ["srun", *_] if "python" in words:
            check(words[words.index("python") :], monkeypatch)
        case ["make", *_]:
            plan = subprocess.run([*words, "-n"], capture_output=True, text=True, check=True).stdout
            for line in re.findall(r"bin/(python \w+/\w+\.py.*)", plan):
                check(shlex.split(line), monkeypatch)
        case ["pip", "install", *_]:
            known = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
            extras = [e for word in words if "jax[cuda" not in word for e in re.findall(r"\[(.*?)\]", word)]
            assert {name for one in extras for name in one.split(",")} <= set(known), words
        case ["python", "-c", code]:
            exec(code, {})
        case ["pytest" | "export" | "gcloud", *_] | ["python3", "-m", "venv", _] | [".", _]:
            pass
        case [".ci/run"]:
            assert (ROOT / ".ci" / "run").exists()
        case _:
            pytest.fail(f"a page has a command that this test does not know: {shlex.join(words)}")


class Parsed(Exception):
    """The flags were understood."""


def parse(monkeypatch, command) -> None:
    """``command()`` up to where its flags have been parsed."""
    understand, flags = tyro.cli, argparse.ArgumentParser.parse_args

    def cli(*args, **options):
        config = understand(*args, **options)
        if dataclasses.is_dataclass(config) and hasattr(config, "preset"):
            check_config(config)
        raise Parsed

    def parse_args(parser, args=None, namespace=None):
        flags(parser, args, namespace)
        raise Parsed

    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(tyro, "cli", cli)
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        command()


def expanded(words: list[str]) -> list[str]:
    """What a shell makes of ``runs/a*``."""
    found = [[str(path) for path in sorted(Path().glob(word))] if "*" in word else [word] for word in words]
    return [word for words in found for word in words]
