"""Film the first episode of a run's final evaluation as a GIF that is small enough for a web page.

    python benchmarks/film.py runs/<run name> benchmarks/results/pendulum.gif

It always starts as the first episode of the final evaluation does: no episode is chosen. After short ones come the next.
"""

import io
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from steadyrl.errors import UsageError  # noqa: E402
from steadyrl.evaluation import FINAL_EVALUATION_SEED  # noqa: E402
from steadyrl.files import replace_file  # noqa: E402
from steadyrl.policies import load_agent  # noqa: E402

MOST_BYTES = 500_000
SECONDS, FRAMES_PER_SECOND = 6.0, 12.5  # browsers round the time of a frame to hundredths of a second


@dataclass
class Options:
    """Film the best policy of a run."""

    run: tyro.conf.Positional[Path]
    """the run's folder"""
    to: tyro.conf.Positional[Path]
    """the GIF to write; one that is there is replaced"""
    width: int = 240
    """of the picture, in pixels; less if the file would be larger than 500 kB"""


def film(run: Path) -> list[Image.Image]:
    """The pictures of the episode's first seconds, as many per second as the GIF shows."""
    agent, env = load_agent(run, render_mode="rgb_array")
    stride = max(1, round(env.metadata.get("render_fps", 30) / FRAMES_PER_SECOND))
    render: Any = env.render  # an array, with this mode
    pictures: list[Image.Image] = []
    for seed in itertools.count(FINAL_EVALUATION_SEED):
        if len(pictures) > SECONDS * FRAMES_PER_SECOND / 2:
            break
        obs, _ = env.reset(seed=seed)
        pictures.append(Image.fromarray(render()))
        step, ended = 0, False
        while not ended and len(pictures) < SECONDS * FRAMES_PER_SECOND:
            obs, _, terminated, truncated, _ = env.step(agent.act(obs[None])[0])
            step, ended = step + 1, terminated or truncated
            if step % stride == 0 or ended:
                pictures.append(Image.fromarray(render()))
    env.close()
    return pictures


def gif(pictures: list[Image.Image], width: int) -> bytes:
    """A GIF of these pictures that repeats for ever."""
    height = round(pictures[0].height * width / pictures[0].width)
    first, *others = (picture.resize((width, height)).quantize(64) for picture in pictures)
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=others, duration=1000 / FRAMES_PER_SECOND, loop=0, optimize=True)
    return file.getvalue()


def main(options: Options) -> None:
    pictures, width = film(options.run), options.width
    while len(data := gif(pictures, width)) > MOST_BYTES:
        width = width * 9 // 10
    replace_file(options.to, lambda file: file.write(data))
    print(f"{options.to}: {len(pictures)} pictures of {width} pixels' width, {len(data) / 1000:.0f} kB")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except UsageError as error:
        sys.exit(f"error: {error}")
