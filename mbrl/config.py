"""Configs are nested frozen dataclasses; this fills them from presets, flags and run folders."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import importlib
import inspect
import os
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from mbrl.errors import UserError, exit_with
from mbrl.interruption import Interrupted

T = TypeVar("T")


def choose(field: str, name: str, options: Sequence[str]) -> str:
    """``name`` if it is one of ``options``, else a UserError that names close ones."""
    if name in options:
        return name
    close = difflib.get_close_matches(name, options, n=3)
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    raise UserError(f"{field} is {name!r}{hint}, it must be one of: {', '.join(options)}")


def resolve(path: str) -> Any:
    """What an import path ``module:name`` stands for."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def load_factory(field: str, name: str, registry: Mapping[str, str]) -> Callable[..., Any]:
    """The factory that ``registry`` names by import path ``module:function``."""
    return resolve(registry[choose(field, name, list(registry))])


def config_type(factory: Callable[..., Any]) -> type:
    """The dataclass that a factory takes as its argument ``config``."""
    return typing.get_type_hints(factory)["config"]


def field_docs(config: type) -> dict[str, str]:
    """The docstring below each field of a config dataclass, inherited fields included, on one line."""
    found = {}
    for base in (one for one in reversed(config.__mro__) if dataclasses.is_dataclass(one)):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for field, doc in zip(tree.body, tree.body[1:]):  # type: ignore[attr-defined]
            if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
                found[field.target.id] = " ".join(ast.literal_eval(doc.value).split())  # type: ignore
    return found


def override(config: T, values: Mapping[str, Any]) -> T:
    """``config`` with fields replaced; nested mappings go into nested dataclasses. UserError for an unknown
    field. Lists become tuples where the field holds one (JSON has no tuples)."""
    known = {f.name for f in dataclasses.fields(config)}  # type: ignore[arg-type]
    changes = {}
    for name, value in values.items():
        if name not in known:
            choose(f"field of {type(config).__name__}", name, sorted(known))
        current = getattr(config, name)
        if dataclasses.is_dataclass(current) and isinstance(value, Mapping):
            value = override(current, value)
        elif isinstance(current, tuple):
            value = tuple(value)
        changes[name] = value
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


INT_MAX = 2**31 - 1  # devices count in int32
FLOAT_MIN, FLOAT_MAX = 1.2e-38, 3.4e38  # what float32 tells from 0 and from infinity
ALLOWED = {
    bool: "True or False",
    int: f"a whole number between 0 and {INT_MAX}",
    float: f"0, or a number between {FLOAT_MIN} and {FLOAT_MAX}",
    str: "a text",
}


def check_config(config: Any, prefix: str = "") -> None:
    """UserError for the first field, nested ones included, whose value is not of its annotated type.

    Every number must be finite and not negative, as no setting means anything below zero, and fit into 32
    bits. Narrower limits are checked where a field is used.
    """
    kinds = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, kind, name = getattr(config, field.name), kinds[field.name], prefix + field.name
        if dataclasses.is_dataclass(value):
            check_config(value, f"{name}.")
        elif typing.get_origin(kind) is typing.Literal:
            choose(name, str(value), typing.get_args(kind))
        elif typing.get_origin(kind) is tuple:
            for one in value:
                choose(name, str(one), typing.get_args(typing.get_args(kind)[0]))
        elif not _is_allowed(value, kind):
            raise UserError(f"{name} is {value!r}, it must be {ALLOWED.get(kind, 'a table of settings')}")


def _is_allowed(value: Any, kind: Any) -> bool:
    if isinstance(value, bool) or kind in (bool, str):
        return type(value) is kind
    if kind is int:
        return isinstance(value, int) and 0 <= value <= INT_MAX
    if kind is float:
        return isinstance(value, (int, float)) and (value == 0 or FLOAT_MIN <= value <= FLOAT_MAX)
    return False


def differences(before: Any, after: Any, prefix: str = "") -> list[str]:
    """Names of the fields in which two configs differ, nested ones with dots."""
    if type(before) is not type(after) or not dataclasses.is_dataclass(before):
        return [prefix.rstrip(".")] if before != after else []
    names = []
    for field in dataclasses.fields(before):
        a, b = getattr(before, field.name), getattr(after, field.name)
        names += differences(a, b, f"{prefix}{field.name}.")
    return names


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of every field of a nested config, names with dots."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def early_flags(argv: Sequence[str], **defaults: Any) -> argparse.Namespace:
    """Values of a few flags before the real parser runs, because its defaults depend on them. Malformed
    values are left to the real parser: here they count as the default."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, default in defaults.items():
        kind = str if default is None else _whole if type(default) is int else type(default)
        if kind is bool:
            parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", default=default)
        else:
            flags = {f"--{name.replace('_', '-')}", f"--{name}"}
            parser.add_argument(*sorted(flags), dest=name, type=kind, default=default)
    try:
        return parser.parse_known_args(argv)[0]
    except (argparse.ArgumentError, SystemExit):
        return argparse.Namespace(**defaults)


def parse_flags(argv: Sequence[str], config: T) -> T:
    """``config`` with the flags of ``argv``. --help shows the script's own text and the flags that are no
    settings of a part; those have a line per part, and --help-all shows all of them."""
    import tyro

    if {"-h", "--help"} & set(argv):
        _show_help(config)
        raise SystemExit(0)
    values = dataclasses.asdict(config)  # type: ignore[call-overload]
    _check_switches(argv, values)
    given = ["--help" if flag == "--help-all" else flag for flag in _whole_numbers(argv, values)]
    return tyro.cli(type(config), args=given, default=config)


def _check_switches(argv: Sequence[str], config: Mapping[str, Any]) -> None:
    """UserError where a flag that is on or off gets a value: the parser would only name the value."""
    names = [name.replace("_", "-") for name, value in flatten(config) if isinstance(value, bool)]
    off = {name: ".".join([*name.split(".")[:-1], "no-" + name.split(".")[-1]]) for name in names}
    switches = {f"--{flag}": name for name in names for flag in (name, off[name])}
    for word, following in zip(argv, [*argv[1:], "--"]):
        flag, equals, value = word.partition("=")
        name = switches.get(flag.replace("_", "-"))
        if name and (equals or not following.startswith("-")):
            raise UserError(
                f"{flag} is on or off and takes no value, found {(value if equals else following)!r}: "
                f"--{name} alone turns it on, --{off[name]} turns it off"
            )


def _whole(text: str) -> int:
    """ValueError where ``text`` is no whole number."""
    if text.lstrip("-").isdecimal():
        return int(text)
    number = float(text)
    if not number.is_integer():
        raise ValueError(text)
    return int(number)


def _whole_numbers(argv: Sequence[str], config: Mapping[str, Any]) -> list[str]:
    """``argv`` with the values of integer fields written out, 1e5 as 100000. UserError where one is no whole
    number: the parser would only say that int() cannot read it."""
    flags, words = {f"--{k.replace('_', '-')}" for k, v in flatten(config) if type(v) is int}, list(argv)
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        flag, at = flag.replace("_", "-"), i if equals else i + 1
        if flag not in flags or at == len(argv):
            continue
        value = value if equals else argv[at]
        try:
            words[at] = f"{flag}={_whole(value)}" if equals else str(_whole(value))
        except ValueError:
            sentence = f"{flag} must be a whole number, as 100000 or 1e5, found {value!r}"
            raise UserError(sentence) from None
    return words


def _show_help(config: Any) -> None:
    import tyro
    from rich.console import Console
    from rich.table import Table

    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    parts = {name: value for name, value in values.items() if dataclasses.is_dataclass(value)}
    docs, kinds = field_docs(type(config)), typing.get_type_hints(type(config), include_extras=True)
    explained = lambda name: typing.Annotated[kinds[name], tyro.conf.arg(help=docs[name])]
    flags = [(k, explained(k), dataclasses.field(default=v)) for k, v in values.items() if k not in parts]
    text = sys.modules[type(config).__module__].__doc__
    with contextlib.suppress(SystemExit):
        tyro.cli(dataclasses.make_dataclass("Flags", flags, kw_only=True), args=["--help"], description=text)
    table = Table.grid(padding=(0, 2))
    for name, part in parts.items():
        if fields := _count(part):
            table.add_row(f"  --{name.replace('_', '-')}.*", f"{fields} settings", docs.get(name, ""))
    console = Console(highlight=False)
    console.print("Settings of the parts, listed by --help-all:")
    console.print(table)
    if "preset" in values:
        console.print("What presets cost and what they reached: python -m mbrl presets")


def _count(config: Any) -> int:
    """Fields, those of nested configs included."""
    values = [getattr(config, f.name) for f in dataclasses.fields(config)]
    return sum(_count(value) if dataclasses.is_dataclass(value) else 1 for value in values)


def run_main(main: Callable[[Sequence[str]], None]) -> None:
    """Runs ``main(argv)``; what the user can mend ends in one sentence and exit code 2, not a traceback.

    A run that SIGTERM or Ctrl-C ended with a checkpoint exits with 143 or 130 (128 + signal).
    """
    try:
        main(sys.argv[1:])
    except UserError as error:
        exit_with(error)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(stop.exit_code) from None
    except KeyboardInterrupt as stop:
        print(": ".join(filter(None, ["interrupted", str(stop)])), file=sys.stderr)
        sys.stdout.flush()
        # No ordinary exit: it waits for a compilation that is still going on, and crashes in the end.
        os._exit(130)
