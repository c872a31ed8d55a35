"""Model-based reinforcement learning in JAX: world models, imagination, planning, many seeds at once."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mbrl.finished import Finished

__version__ = "0.1.0"


def load(run_dir: str | os.PathLike, **acting: Any) -> Finished:
    """The trained agents of a run folder, to act, evaluate and imagine with: see `mbrl.finished.load`."""
    from mbrl import finished  # here, so that `import mbrl` alone stays cheap

    return finished.load(run_dir, **acting)
