"""The one error that is meant for the person at the keyboard."""

from __future__ import annotations

import sys
from typing import NoReturn

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


def check_at_least(field: str, value: float, least: float) -> None:
    """UserError unless ``value`` is a number of at least ``least``."""
    if not value >= least:  # also refuses nan
        raise UserError(f"{field} is {value}, it must be at least {least}")


def check_above(field: str, value: float, bound: float) -> None:
    """UserError unless ``value`` is a number above ``bound``."""
    if not value > bound:
        raise UserError(f"{field} is {value}, it must be above {bound}")


def check_between(field: str, value: float, low: float, high: float) -> None:
    """UserError unless low <= value <= high."""
    if not low <= value <= high:
        raise UserError(f"{field} is {value}, it must lie between {low} and {high}")
