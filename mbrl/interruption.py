"""SIGTERM and Ctrl-C end a run at its next iteration, with a checkpoint."""

from __future__ import annotations

import os
import shlex
import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """A signal ended the run in order; the message says how to go on, ``exit_code`` is 128 + signal."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.exit_code = 128 + number

    @classmethod
    def at(cls, where: str, run_dir: str | os.PathLike, saved: bool, number: int) -> Interrupted:
        """Of a run in ``run_dir`` that got as far as ``where``. saved: whether a checkpoint of that was
        written."""
        newest = f"checkpoint at {where}" if saved else "the newest older checkpoint"
        run_dir = shlex.quote(os.fspath(run_dir))
        return cls(f"stopped at {where}; --resume --run-dir {run_dir} continues from {newest}", number)


class Interruption:
    """While active, the first signal is noted in ``number``; a second one raises KeyboardInterrupt at once.

    Python runs handlers between instructions, so a compiled program or a compilation is finished first.
    Signals reach the main thread only; elsewhere they keep their meaning.
    """

    number: int | None = None

    def __enter__(self) -> Interruption:
        main = threading.current_thread() is threading.main_thread()
        self._before = {n: signal.signal(n, self._note) for n in SIGNALS} if main else {}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt("--resume continues from the run folder's newest checkpoint")
        self.number = number
        # Not print: the signal may have come in the middle of one. A progress bar draws over the line above.
        notice = b"\nstopping after this iteration, with a checkpoint; once more stops at once\n"
        os.write(2, notice + b"\n" * os.isatty(2))
