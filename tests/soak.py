"""Trains for some minutes with frequent evaluations and checkpoints; prints how memory, open files and the time
of an update developed.

    python tests/soak.py --minutes 60

The run ends itself with SIGTERM, as a scheduler would. The first third counts as warm-up.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
FLAGS = """
    --preset xs --steps 2000000000 --loop.replay-size 20000 --loop.log-every 2000 --loop.eval-every 4000
    --loop.eval-episodes 4 --loop.checkpoint-every 4000
""".split()  # noqa: SIM905


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def logged_updates(path: Path) -> int:
    """Of the latest whole row. The watcher must not need more memory the longer it watches."""
    try:
        with open(path / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 16384))
            return json.loads(file.read().split(b"\n")[-2])["updates"]
    except (FileNotFoundError, IndexError):
        return 0


def watch(minutes: float, path: Path, samples: list[tuple[float, float, int, float, int]]) -> None:
    """(seconds, MiB, open files, CPU seconds, updates that are logged) every 5 seconds, then SIGTERM."""
    began = time.monotonic()
    while (now := time.monotonic() - began) < 60 * minutes:
        files = len(os.listdir("/proc/self/fd"))
        samples.append((now, resident_mib(), files, time.process_time(), logged_updates(path)))
        time.sleep(5)
    os.kill(os.getpid(), signal.SIGTERM)


def slope(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.polyfit(x - x.mean(), y, 1)[0])


def report(samples: np.ndarray, rows: list[dict]) -> None:
    """Slopes over the last two thirds. Where other processes share the cores, the CPU time of an update says
    more than its wall time; evaluations and checkpoints are part of it."""
    kept = samples[len(samples) // 3 :]
    hours = kept[:, 0] / 3600
    print(
        f"memory {kept[-1, 1]:.0f} MiB, slope {slope(hours, kept[:, 1]):+.2f} MiB/h over {np.ptp(hours):.2f} h"
    )
    print(f"open files {kept[:, 2].min():.0f} to {kept[:, 2].max():.0f}")
    updates, seconds = (
        np.array([row[k] for row in rows if row["updates"]]) for k in ("updates", "time/train")
    )
    each = np.diff(seconds) / np.diff(updates) * 1000
    third = len(each) // 3
    early, late = np.median(each[third : 2 * third]), np.median(each[2 * third :])
    print(
        f"update {early:.2f} ms in the second third, {late:.2f} ms in the last ({100 * (late / early - 1):+.1f} %)"
    )
    half = len(kept) // 2
    early, late = (1000 * slope(part[:, 4], part[:, 3]) for part in (kept[:half], kept[half:]))
    print(f"CPU time of an update {early:.2f} ms, {late:.2f} ms ({100 * (late / early - 1):+.1f} %)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--task", default="pendulum")
    options = parser.parse_args()
    import dreamer_dmc

    from mbrl.interruption import Interrupted
    from mbrl.logger import read_metrics

    samples: list[tuple[float, float, int, float, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        threading.Thread(target=watch, args=(options.minutes, path, samples), daemon=True).start()
        try:
            dreamer_dmc.main([*FLAGS, "--task", options.task, "--run-dir", str(path)])
        except Interrupted as stop:
            print(stop)
        report(np.array(samples), read_metrics(path))


if __name__ == "__main__":
    main()
