"""Pictures of a policy: trajectories in several scenes, and an animation of episodes."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Circle

from free_dit.policy.rollout import EXECUTED, Episodes
from free_dit.policy.world import AGENT_RADIUS, GOAL_TOLERANCE, Scenes

# Passed on the left of the obstacle, on the right; ended in contact or out of time.
LEFT, RIGHT, FAILED = "tab:blue", "tab:orange", "tab:red"


def _draw_scene(axes: Axes, scenes: Scenes, row: int) -> None:
    axes.add_patch(Circle(scenes.centre[row], scenes.radius[row], color="0.75"))
    axes.add_patch(Circle(scenes.goal[row], GOAL_TOLERANCE, color="tab:green", alpha=0.6))
    axes.add_patch(Circle(scenes.start[row], AGENT_RADIUS, fill=False, color="0.3"))
    axes.set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), aspect="equal", xticks=[], yticks=[])


def _colour(episodes: Episodes, row: int) -> str:
    if not episodes.reached[row]:
        return FAILED
    return LEFT if episodes.side[row] == 1 else RIGHT


def trajectory_picture(path: Path, scenes: Scenes, episodes: Episodes, tries: int, title: str) -> None:
    """A panel for each scene with the paths of its ``tries`` episodes, which follow one another in ``episodes``."""
    count = len(scenes) // tries
    wide = int(np.ceil(np.sqrt(count)))
    high = -(-count // wide)
    size = (2.4 * wide, 2.4 * high + 0.7)
    figure, panels = plt.subplots(high, wide, figsize=size, squeeze=False, layout="constrained")
    for panel in panels.flat:
        panel.set_axis_off()
    for number, panel in zip(range(count), panels.flat, strict=False):
        panel.set_axis_on()
        _draw_scene(panel, scenes, number * tries)
        for row in range(number * tries, (number + 1) * tries):
            way = episodes.position[row, : episodes.steps[row] + 1]
            panel.plot(*way.T, color=_colour(episodes, row), lw=1, alpha=0.7)
    figure.suptitle(title)
    names = {"left of the obstacle": LEFT, "right of it": RIGHT, "not at the goal": FAILED}
    lines = [Line2D([], [], color=colour, label=name) for name, colour in names.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def animation(path: Path, scenes: Scenes, episodes: Episodes, tries: int, every: int = 2) -> None:
    """A GIF of the ``tries`` episodes of the first scene at once; thin lines are the chunks that were decided on.

    Args:
        path: of the file.
        scenes: of the episodes.
        episodes: at least ``tries``.
        tries: episodes that are shown.
        every: steps from one frame to the next.
    """
    figure, axes = plt.subplots(figsize=(4, 4), layout="constrained")
    _draw_scene(axes, scenes, 0)
    rows = range(tries)
    agents, ways, plans = [], [], []
    for row in rows:
        colour = _colour(episodes, row)
        agents.append(axes.add_patch(Circle(scenes.start[row], AGENT_RADIUS, color=colour, alpha=0.7)))
        ways += axes.plot([], [], color=colour, lw=1.5)
        plans += axes.plot([], [], color=colour, lw=0.8, ls=":")
    last = int(episodes.steps[:tries].max())

    def show(step: int) -> list[plt.Artist]:
        for row in rows:
            now = min(step, int(episodes.steps[row]))
            agents[row].center = episodes.position[row, now]
            ways[row].set_data(*episodes.position[row, : now + 1].T)
            plans[row].set_data(*(episodes.plans[row, min(now // EXECUTED, int(episodes.decisions[row]) - 1)].T))
            plans[row].set_visible(now < episodes.steps[row])
        return [*agents, *ways, *plans]

    frames = [*range(0, last, every), *[last] * 8]
    path.parent.mkdir(parents=True, exist_ok=True)
    FuncAnimation(figure, show, frames=frames, blit=True).save(path, PillowWriter(fps=12), dpi=70)
    plt.close(figure)
