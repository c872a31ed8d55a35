"""The one error that is meant for the person at the keyboard."""

from __future__ import annotations

import sys
from numbers import Real
from typing import Any, NoReturn

USER_ERROR_EXIT_CODE = 2


class UserError(Exception):
    """Something the user asked for cannot be done; the message is one sentence that says what and why.

    It names the field or file, what was found and what is allowed. Programs end with exit code 2 and the
    sentence, without a traceback (see ``exit_with``). Bugs raise ordinary exceptions instead.
    """

    exit_code = USER_ERROR_EXIT_CODE


def exit_with(error: BaseException) -> NoReturn:
    """Print ``error: <message>`` to stderr, without a traceback, and exit with the error's exit code (2)."""
    message = " ".join(str(error).split())  # one line, whatever the message was assembled from
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(getattr(error, "exit_code", USER_ERROR_EXIT_CODE))


def is_known(value: Any) -> bool:
    """Whether ``value`` can be looked at now. The numbers of a sweep are checked one by one, before they are
    inputs of a program in which the same code runs again."""
    return isinstance(value, Real)


def check_at_least(field: str, value: Any, least: float) -> None:
    """UserError unless ``value`` is a number of at least ``least``."""
    if is_known(value) and not value >= least:  # also refuses nan
        raise UserError(f"{field} is {value}, it must be at least {least}")


def check_above(field: str, value: Any, bound: float) -> None:
    """UserError unless ``value`` is a number above ``bound``."""
    if is_known(value) and not value > bound:
        raise UserError(f"{field} is {value}, it must be above {bound}")


def check_between(field: str, value: Any, low: float, high: float) -> None:
    """UserError unless low <= value <= high."""
    if is_known(value) and not low <= value <= high:
        raise UserError(f"{field} is {value}, it must lie between {low} and {high}")
