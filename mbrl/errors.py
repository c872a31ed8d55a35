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
