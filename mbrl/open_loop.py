"""Films of what a world model expects: truth and model, from what it saw to what it imagines.

The model sees a few frames of a real episode, then only the actions that were taken (as arXiv 1912.01603,
figure 4, shows it).
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mbrl.envs import dmc
from mbrl.errors import UserError
from mbrl.finished import Finished, expect
from mbrl.images import is_image
from mbrl.run_folder import write_atomic
from mbrl.types import Trajectory, WorldModel

CONTEXT = 5
"""Frames that the model sees; what it makes of them is shown."""
HORIZON = 45
"""Frames that it predicts after them."""
COLUMNS = 6
"""Points of an episode that are predicted from, side by side."""
BODIES = 3
"""The same where bodies are drawn."""
SIDE = 160
"""Of a picture of bodies, in pixels."""
STRIP = 10
"""Moments that a strip shows, of the first of them."""
NAME = "open_loop"


def measure(
    run: Finished, played: Trajectory | None = None, seed: int | None = None
) -> dict[str, np.ndarray]:
    """Predicts an episode of a seed open-loop from points all along it.

    played: [S, T, E], as `Finished.play` returns it, or None to play now; the first episode of the seed is
    taken. Returns {name: uint8 [T, R, N, h, w, 3]}: T frames, of which the first `CONTEXT` were seen; rows:
    truth, model and, of pictures that the agent sees, error, in which grey is none; N points. Of stacked
    frames the newest is shown. Where the agent sees none, MuJoCo draws where dm_control's bodies were and
    where the model expects them. Raises UserError with the reason where there is nothing to see.
    """
    params = run.learned(seed).params["model"]
    if not _decodes(run.model, params):
        raise UserError("this world model does not predict observations")
    if images := [key for key, entry in run.spec.obs.items() if is_image(entry)]:
        pairs = _pairs(run, params, _episode(run, played, seed), COLUMNS)
        return {key: _with_error(*pairs[key]) for key in images}
    with contextlib.closing(_stage(run.spec.name)) as stage:
        return {"bodies": _pictures(stage, _pairs(run, params, _episode(run, played, seed), BODIES))}


def _decodes(model: WorldModel, params: Any) -> bool:
    """Whether a model predicts observations."""
    states = model.starts(params, model.init_state(params, 1)).states
    return model.decode(params, model.features(params, states)) is not None


def _episode(run: Finished, played: Trajectory | None, seed: int | None) -> Trajectory:
    """The first episode [T, 1] of a seed in ``played`` [S, T, E], or in what is played now."""
    played = run.play(1)[1] if played is None else played
    index = run.seeds.seeds.index(run.seeds.seeds[0] if seed is None else seed)
    episode = jax.tree.map(lambda x: jnp.asarray(x[index, :, :1]), played)
    length = int(np.asarray(episode.is_last[:, 0]).argmax()) or episode.reward.shape[0] - 1
    return jax.tree.map(lambda x: x[: length + 1], episode)


def _pairs(
    run: Finished, params: Any, episode: Trajectory, columns: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{key: (truth, model)}, each [T, N, *shape]: what an episode [T, 1] shows around ``columns`` points, and
    what the model makes of it."""
    length = len(episode.reward) - 1
    context, horizon = min(CONTEXT, length // 2), min(HORIZON, length - length // 2)
    if context < 1:
        raise UserError("the episode is too short")
    last = length - horizon  # the latest point with so much ahead
    points = np.linspace(min(context - 1, last), last, columns).astype(int)
    drawn = jax.jit(_draw, static_argnums=(0, 3))(
        run.model, params, episode, (tuple(points), context, horizon)
    )
    moments = np.maximum(points + np.arange(1 - context, horizon + 1)[:, None], 0)
    return {key: (np.asarray(episode.obs[key][:, 0])[moments], np.asarray(x)) for key, x in drawn.items()}


def _with_error(truth: np.ndarray, model: np.ndarray) -> np.ndarray:
    """uint8 [T, 3, N, h, w, 3] of pictures [T, N, h, w, c]: both, and their difference, grey where none."""
    truth, shown = truth.astype(np.float32), np.clip(model, 0, 255, dtype=np.float32)
    error = np.clip((shown - truth) / 2 + 127.5, 0, 255)
    return _newest(np.round(np.stack([truth, shown, error], 1)).astype(np.uint8))


def _stage(task: str) -> Any:
    """An environment in which the bodies of a task can be posed and drawn; UserError where they cannot."""
    if dmc.canonical(task) is None:
        raise UserError(f"{task} is none of dm_control's tasks")
    stage = dmc.make(task, 0)
    try:
        if not stage.can_pose:
            raise UserError(f"positions cannot be recovered from observations of {task}")
        stage.reset()
        stage.render(SIDE, SIDE)
    except (UserError, RuntimeError) as error:
        stage.close()
        raise UserError(str(error)) from error
    return stage


def _pictures(stage: Any, pairs: dict[str, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """[T, 2, N, h, w, 3]: where the bodies were, and where they were expected. stage: what `_stage` returned.
    pairs: {key: [T, N, *shape] of either}."""

    def picture(row: int, t: int, n: int) -> np.ndarray:
        stage.pose({key: pair[row][t, n] for key, pair in pairs.items()})
        return stage.render(SIDE, SIDE)

    steps, points = next(iter(pairs.values()))[0].shape[:2]
    film = [[[picture(row, t, n) for n in range(points)] for row in range(2)] for t in range(steps)]
    return np.array(film)


def _draw(model, params, episode: Trajectory, where) -> dict[str, jax.Array]:
    """{key: [T, N, *shape]}: reconstructions of the context, then the open-loop prediction."""
    points, context, horizon = np.array(where[0]), where[1], where[2]
    observe_key, key = jax.random.split(jax.random.key(0))
    keys = jax.random.split(observe_key, episode.reward.shape[0])
    seen = model.observe(params, model.init_state(params, 1), episode, keys)
    states = jax.tree.map(lambda x: x[points], seen.starts.states)
    actions = jnp.stack([episode.action[points + h] for h in range(1, horizon + 1)])
    expected = expect(model, params, seen.starts._replace(states=states), actions, key)
    before = np.maximum(points + np.arange(1 - context, 1)[:, None], 0)
    decoded = model.decode(params, seen.features[before, 0])
    predicted = {k: x[:, :, 0] for k, x in expected.obs.items()}
    return {k: jnp.concatenate([decoded[k].mode(), x]) for k, x in predicted.items()}


def _newest(film: np.ndarray) -> np.ndarray:
    """RGB of [..., c]: the newest of stacked frames; one channel becomes three."""
    return film[..., -3:] if film.shape[-1] >= 3 else np.repeat(film[..., -1:], 3, -1)


def grid(film: np.ndarray) -> np.ndarray:
    """[T, R, N, h, w, 3] -> frames [T, R h, N w, 3]."""
    t, rows, n, h, w, c = film.shape
    return film.transpose(0, 1, 3, 2, 4, 5).reshape(t, rows * h, n * w, c)


def strip(film: np.ndarray) -> np.ndarray:
    """[T, R, N, h, w, 3] -> one picture [R h, K w, 3] of the first point at K moments, evenly spread."""
    moments = np.unique(np.linspace(0, len(film) - 1, STRIP).astype(int))
    return grid(film[moments, :, :1].transpose(2, 1, 0, 3, 4, 5))[0]


def encode(frames: np.ndarray, kind: str, per_second: int = 15) -> bytes:
    """Frames [T, h, w, 3] as an animated GIF, or the first as a PNG; small ones are drawn larger."""
    from PIL import Image  # matplotlib brings it

    scale = max(1, 192 // frames.shape[1])
    pictures = [Image.fromarray(x.repeat(scale, 0).repeat(scale, 1)) for x in frames]
    buffer = io.BytesIO()
    more = {"save_all": True, "append_images": pictures[1:], "duration": 1000 // per_second, "loop": 0}
    pictures[0].save(buffer, format=kind, **(more if kind == "GIF" else {}))
    return buffer.getvalue()


def write(run: Finished, played: Trajectory | None = None) -> list[Path]:
    """Films of the first seed as ``videos/open_loop_NAME.gif``, strips of them as PNG, both also for
    TensorBoard. Returns the paths. played, errors: as in `measure`."""
    videos, written, pictures = run.run_dir / "videos", [], {}
    for key, film in measure(run, played).items():
        videos.mkdir(exist_ok=True)
        for kind, shown in (("GIF", grid(film)), ("PNG", strip(film)[None])):
            path, data = videos / f"{NAME}_{key}.{kind.lower()}", encode(shown, kind)
            write_atomic(path, data)
            written.append(path)
            pictures[path.name] = data, shown.shape
    if pictures:
        _to_tensorboard(run.run_dir / "tensorboard" / f"seed_{run.seeds.seeds[0]}", pictures, run.frames)
    return written


def _to_tensorboard(folder: Path, pictures: dict[str, tuple[bytes, tuple[int, ...]]], step: int) -> None:
    """Encoded pictures as they are: TensorBoard plays a GIF."""
    from tensorboardX import SummaryWriter, summary

    writer: Any = SummaryWriter(str(folder))
    for tag, (data, shape) in pictures.items():
        image = summary.Summary.Image(
            height=shape[1], width=shape[2], colorspace=3, encoded_image_string=data
        )
        entry = summary.Summary.Value(tag=tag, image=image)
        writer.file_writer.add_summary(summary.Summary(value=[entry]), step)
    writer.close()
