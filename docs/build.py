"""Hooks of mkdocs (`make docs`): pages that are made of the repository, and links that lead to them.

README, CONTRIBUTING, CHANGELOG and the like become pages; so does every source file that a page links to, so
that the site needs no other site. Configuration and presets are printed from the dataclasses themselves.
Diagrams are pictures, drawn once from their mermaid source: docs/figures/diagram-<start of its sha256>.svg.
One without a picture is shown as its source, because drawing it in the browser would fetch a renderer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import sys
import typing
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # experiments are not installed

from mbrl import presets  # noqa: E402
from mbrl.config import config_type, field_docs, flatten, resolve  # noqa: E402

# Here, because mkdocs takes back what was added to sys.path.
SCRIPTS = {p.stem: import_module(f"experiments.{p.stem}") for p in sorted(ROOT.glob("experiments/*.py"))}
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "mbrl/data/README.md": "curves.md",
}
LINK = re.compile(r"(\]\()([^)\s:#]+)(#[^)\s]*)?\)")  # a link within the repository


def on_files(files, *, config):
    from mkdocs.structure.files import File

    for path, text in _pages():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, *, page, config, files) -> str:
    """Links as they work in the repository become links between pages."""
    drawn = re.sub(r"^```mermaid\n(.*?)^```", _picture, markdown, flags=re.S | re.M)
    return _with_links(drawn, page.file.src_uri)


def _picture(diagram: re.Match) -> str:
    path = f"figures/diagram-{hashlib.sha256(diagram[1].encode()).hexdigest()[:8]}.svg"
    return f"[![diagram]({path})]({path})" if (ROOT / "docs" / path).exists() else diagram[0]


def _pages() -> Iterator[tuple[str, str]]:
    """(page, Markdown) of everything that is not a file of docs/."""
    linked = set()
    for path in sorted([*PAGES, *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]):
        text = (ROOT / path).read_text()
        for _, target, _ in LINK.findall(text):
            linked.add(_in_repository(path, target))
        if path in PAGES:
            yield PAGES[path], text
    for path in sorted(p for p in linked if (ROOT / p).is_file() and _page_of(p).startswith("source/")):
        language = {".py": "python", ".cff": "yaml"}.get(Path(path).suffix, "text")
        code = (ROOT / path).read_text()
        yield _page_of(path), f"# {path}\n\n`````{{.{language} linenums=1}}\n{code}`````\n"
    yield "configuration.md", configuration()
    yield "presets.md", preset_tables()


def _in_repository(path: str, target: str) -> str:
    """What a link in the file ``path`` points at."""
    return normpath(PurePosixPath(path).parent / target)


def _page_of(path: str) -> str:
    """The page of a file in the repository."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md"


def _with_links(markdown: str, page: str) -> str:
    own = next((path for path, name in PAGES.items() if name == page), f"docs/{page}")

    def to_page(found: re.Match) -> str:
        there = relpath(_page_of(_in_repository(own, found[2])), PurePosixPath(page).parent)
        return f"{found[1]}{there}{found[3] or ''})"

    blocks = re.split(r"(^ *(`{3,}).*?^ *\2 *$)", markdown, flags=re.S | re.M)
    return "".join(
        "" if i % 3 == 2 else LINK.sub(to_page, block) if i % 3 == 0 else block
        for i, block in enumerate(blocks)
    )


# Configuration


def configs() -> Iterator[tuple[str, type]]:
    """(where its fields are flags, config): scripts, then parts, then what parts are made of."""
    for name, module in SCRIPTS.items():
        if hasattr(module, "Config"):
            yield f"`experiments/{name}.py`", module.Config
    for flag, group, registry in (
        ("--world-model", "model", "world_models:REGISTRY"),
        ("--planner", "search", "planners:REGISTRY"),
    ):
        for name, path in resolve(registry).items():
            yield f"`--{group}.*` with `{flag} {name}`", config_type(resolve(path))
    for module in SCRIPTS.values():
        yield from _nested(getattr(module, "Config", None), "--")


def _nested(config: Any, prefix: str) -> Iterator[tuple[str, type]]:
    if not dataclasses.is_dataclass(config):
        return
    kinds = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(kind := kinds[field.name]):
            yield f"`{prefix}{field.name.replace('_', '-')}.*`", typing.cast(type, kind)
            yield from _nested(kind, f"{prefix}{field.name.replace('_', '-')}.")


def configuration() -> str:
    """Every field of every config, once: meaning, type, default."""
    uses: dict[type, list[str]] = {}
    for use, config in configs():
        for one in reversed([c for c in config.__mro__ if dataclasses.is_dataclass(c)]):
            uses.setdefault(one, [])
        if use not in uses[config]:
            uses[config].append(use)
    parts = [
        "# Configuration\n",
        "Every setting is a field of a frozen dataclass, and every field a flag: `free_nats` of the world "
        "model is `--model.free-nats`. A preset sets some ([presets](presets.md)), flags override it, "
        "and `config.json` of a run folder has the result. This page is made from them.\n",
    ]
    for config, names in uses.items():
        parts.append(_section(config, names))
    return "\n".join(parts)


def _section(config: type, uses: list[str]) -> str:
    base = next((c for c in config.__mro__[1:] if dataclasses.is_dataclass(c)), None)
    name = _name(config)
    lines = [f"## {name}\n", " ".join((config.__doc__ or "").split()) + "\n"]
    if uses:
        lines.append(f"As {', '.join(uses)}.\n")
    fields = [f for f in dataclasses.fields(config) if f.name not in _unchanged(config, base)]
    if base is not None:
        also = ", and:\n" if fields else ".\n"
        lines.append(f"Fields of [{_name(base)}](#{_anchor(_name(base))})" + also)
    if fields:
        docs, kinds = field_docs(config), typing.get_type_hints(config)
        lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
        for field in fields:
            kind = kinds[field.name]
            doc = docs.get(field.name, kind.__doc__)  # of a table of settings, its own
            cells = (f"`{field.name}`", _kind(kind), _default(field), str(doc).replace("|", "\\|"))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _unchanged(config: type, base: type | None) -> set[str]:
    """Fields that a config has from its base, with the default that they have there."""
    if base is None:
        return set()
    before = {f.name: (f.default, f.default_factory) for f in dataclasses.fields(base)}
    now = {f.name: (f.default, f.default_factory) for f in dataclasses.fields(config)}
    return {name for name, value in now.items() if before.get(name) == value}


def _name(config: type) -> str:
    return config.__module__ + ".Config" if config.__name__ == "Config" else config.__name__


def _anchor(name: str) -> str:
    return name.lower().replace(".", "")


def _kind(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(kind))
    if dataclasses.is_dataclass(kind):
        return f"[{_name(typing.cast(type, kind))}](#{_anchor(_name(typing.cast(type, kind)))})"
    return getattr(kind, "__name__", str(kind)).replace("|", "\\|")


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return ""
    if field.default is dataclasses.MISSING:
        return "of its choice"
    return f"`{field.default:.6g}`" if isinstance(field.default, float) else f"`{field.default!r}`"


def preset_tables() -> str:
    """What each preset costs, reached and sets."""
    parts = ["# Presets\n"]
    for agent, rows in presets.ABOUT.items():
        head = "| preset | parameters | cost on 2 CPU cores | return on `cartpole_swingup` |"
        parts += [f"## {agent}\n", head, "|---|---|---|---|"]
        parts += [*(f"| `{name}` | {' | '.join(about)} |" for name, about in rows.items()), ""]
    parts += ["Figures are of [results](results.md) and [performance](performance.md).\n"]
    parts += ["What a preset sets; an empty cell is the [default](configuration.md):\n"]
    for agent, table in (("DreamerV3", presets.DREAMER), ("TD-MPC2", presets.TDMPC)):
        flat = {name: dict(flatten(preset)) for name, preset in table.items()}
        fields = dict.fromkeys(field for values in flat.values() for field in values)
        parts += [f"## Fields of {agent}\n", f"| field | {' | '.join(flat)} |"]
        parts += ["|---" * (len(flat) + 1) + "|"]
        for field in fields:
            cells = [f"{values[field]}" if field in values else "" for values in flat.values()]
            parts.append(f"| `{field}` | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)
