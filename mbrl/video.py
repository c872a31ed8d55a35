"""Videos of evaluation episodes. Needs the extra [video] and a GL library that renders without a display."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mbrl.types import HostEnv

SIZE = 240


def problem(env: HostEnv) -> str | None:
    """Why no video can be made, in one sentence, or None when it can."""
    try:
        import imageio_ffmpeg  # noqa: F401
    except ImportError:
        return "video is skipped: imageio is not installed, pip install 'mbrl-jax[video]' brings it"
    try:
        env.reset()
        env.render(SIZE, SIZE)
    except RuntimeError as error:
        return f"video is skipped: {error}"
    return None


def record(path: Path, env: HostEnv, run: Callable[[Callable[[], None]], object], fps: int = 25) -> None:
    """Renders ``env`` at every call that ``run(watch)`` makes to ``watch`` and writes an MP4 file."""
    import imageio

    frames: list[np.ndarray] = []
    run(lambda: frames.append(env.render(SIZE, SIZE)))
    with warnings.catch_warnings(), imageio.get_writer(path, fps=fps) as writer:
        warnings.simplefilter("ignore", RuntimeWarning)  # JAX on starting ffmpeg: nothing is forked for long
        for frame in frames:
            writer.append_data(frame)  # type: ignore[attr-defined]
