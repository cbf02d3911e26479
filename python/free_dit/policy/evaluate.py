"""Closed-loop evaluation of a policy: success, laws of actions and time per decision for every method; resumable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from free_dit.evaluation.intervals import check_level, share_interval
from free_dit.experiments.wall_clock import machine
from free_dit.files import keep_settings, plain, read_arrays, write_arrays
from free_dit.policy.distances import energy_distance
from free_dit.policy.methods import Decide, Method, chunks, decider, methods
from free_dit.policy.planner import demonstrate
from free_dit.policy.rollout import Episodes, decision_seed, roll_out
from free_dit.policy.target import PolicyTarget
from free_dit.policy.timing import decision_times, ratio_interval
from free_dit.policy.world import random_scenes
from free_kernels.protocols import Drafter
from free_kernels.validation import check_float, check_int, check_writable, fail

WHERE = "policy evaluate"
# Seed of the scenes, which training does not use.
SCENE_SEED = 1 << 20
REPORT = "evaluation.json"


@dataclass(frozen=True)
class EvaluationSettings:
    """How a policy is evaluated.

    Attributes:
        episodes: of every method, in the same scenes and with the same noise.
        part: episodes run at a time and kept in one file.
        draft_length: rows of a round of the speculative methods.
        relaxation: strength of the relaxed one.
        observations: at which laws of actions are compared; each is one decision of the ordinary sampler's episodes.
        draws: chunks of every method at each of them.
        repeats: timed decisions of every method, for each number of threads; 0 leaves times out.
        threads: numbers of threads to time with.
        seed: of all noise.
        level: of the intervals.
    """

    episodes: int = 500
    part: int = 50
    draft_length: int = 32
    relaxation: float = 1.0
    observations: int = 40
    draws: int = 25
    repeats: int = 40
    threads: tuple[int, ...] = (1, 2)
    seed: int = 0
    level: float = 0.95

    def check(self) -> None:
        """Raise ValueError or TypeError where a setting is wrong."""
        check_int(WHERE, "episodes", self.episodes, 1)
        check_int(WHERE, "part", self.part, 1)
        check_float(WHERE, "relaxation", self.relaxation, 0.0)
        check_int(WHERE, "observations", self.observations, 2)
        check_int(WHERE, "draws", self.draws, 2)
        check_int(WHERE, "repeats", self.repeats, 0)
        check_int(WHERE, "seed", self.seed, 0)
        check_level(WHERE, self.level)
        for count in self.threads:
            check_int(WHERE, "threads", count, 1)


class Evaluation:
    """An evaluation whose finished parts are kept in a folder.

    Args:
        target: the policy.
        drafter: of the speculative methods.
        settings: how.
        out: the folder.
        identity: what the policy and the drafter are, such as hashes of their files; other ones are refused.
        progress: show bars.

    Raises:
        ValueError, TypeError: a wrong setting, or a folder of other settings.
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        target: PolicyTarget,
        drafter: Drafter | str,
        settings: EvaluationSettings,
        out: Path,
        identity: dict[str, str],
        progress: bool = False,
    ) -> None:
        settings.check()
        check_writable(WHERE, "out", out / REPORT)
        self.settings, self.out, self.identity, self.progress = settings, out, identity, progress
        self.methods = methods(settings.draft_length, settings.relaxation)
        self.deciders = {one.name: decider(one, target, drafter) for one in self.methods}
        # Times are of this machine and measured anew every time.
        untimed = {k: v for k, v in asdict(settings).items() if k not in ("repeats", "threads", "level")}
        keep_settings(WHERE, out / "settings.json", untimed | identity, "parts")

    def _kept(self, name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Arrays of a finished part, or made and kept."""
        path = self.out / "parts" / f"{name}.npz"
        found = read_arrays(path)
        if found is None:
            found = make()
            write_arrays(path, found)
        return found

    def episodes(self, method: Method) -> Episodes:
        """All episodes of a method."""
        settings, found = self.settings, []
        scenes = random_scenes(settings.episodes, SCENE_SEED + settings.seed)
        first = range(0, settings.episodes, settings.part)
        for begin in tqdm(first, desc=f"episodes, {method.name}", unit="part", disable=not self.progress):
            numbers = np.arange(begin, min(begin + settings.part, settings.episodes))
            run = (scenes.take(numbers), self.deciders[method.name], settings.seed, numbers)
            found.append(self._kept(f"{method.name}-{begin}", lambda run=run: _arrays(roll_out(*run))))
        return Episodes(*(np.concatenate([part[field.name] for part in found]) for field in fields(Episodes)))

    def compared(self, ordinary: Episodes) -> Tensor:
        """Observations ``[M, history, O]`` at which laws are compared: M decisions of different episodes, in turn.

        Raises:
            ValueError: the episodes had fewer decisions.
        """
        wanted, left = self.settings.observations, ordinary.decisions
        if wanted > left.sum():
            expectation = f"at most {left.sum()}, the decisions of {len(left)} episodes"
            fail(WHERE, "observations", expectation, wanted)
        # An episode gives one decision after the other: its first three, beginning with another than its neighbour's.
        given = [
            (place, (place + turn) % min(3, count) if turn < 3 else turn)
            for turn in range(left.max())
            for place, count in enumerate(left)
            if turn < count
        ]
        episodes, decisions = np.array(given[:wanted]).T
        return torch.from_numpy(ordinary.observations[episodes, decisions])

    def draws(self, name: str, decide: Decide, observations: Tensor, number: int) -> np.ndarray:
        """``[M, n, horizon, A]``, n chunks at each of M observations with noise of their own."""
        settings = self.settings
        keys = torch.arange(settings.draws)

        def draw() -> dict[str, np.ndarray]:
            bar = tqdm(observations, desc=f"actions, {name}", unit="observation", disable=not self.progress)
            found = [
                chunks(decide, one.expand(settings.draws, -1, -1), draw_seed(settings.seed, number, place), keys)[0]
                for place, one in enumerate(bar)
            ]
            return {"chunks": torch.stack(found).numpy()}

        return self._kept(f"draws-{name}", draw)["chunks"]

    def report(self) -> dict[str, Any]:
        """The whole evaluation as plain values; what is missing is made."""
        settings = self.settings
        episodes = {one.name: self.episodes(one) for one in self.methods}
        observations = self.compared(episodes["ordinary"])
        reference = self.draws("ordinary", self.deciders["ordinary"], observations, 0)
        rows: dict[str, Any] = {}
        for number, method in enumerate(self.methods, 1):
            # The ordinary sampler is compared with itself, which shows what equal laws give.
            label = "ordinary-again" if method.name == "ordinary" else method.name
            drawn = self.draws(label, self.deciders[method.name], observations, number)
            distance, p_value = energy_distance(reference, drawn, level=settings.level, seed=settings.seed)
            mine, ordinary = episodes[method.name], episodes["ordinary"]
            rows[method.name] = {
                "settings": asdict(method),
                "success": asdict(share_interval(mine.reached, settings.level)),
                "success_minus_ordinary": paired_difference(mine.reached, ordinary.reached, settings.level),
                "hit": int(mine.hit.sum()),
                "left": float((mine.side == 1).mean()),
                "decisions": int(mine.decisions.sum()),
                "network_calls_per_decision": float(mine.rounds.sum() / mine.decisions.sum()),
                "energy_distance": asdict(distance),
                "p_value": p_value,
            }
        expert = demonstrate(random_scenes(settings.episodes, SCENE_SEED + settings.seed), settings.seed)
        report = {
            "settings": asdict(settings),
            "identity": self.identity,
            "machine": machine(),
            "expert": {
                "success": asdict(share_interval(expert.reached, settings.level)),
                "left": float((expert.side == 1).mean()),
            },
            "methods": rows,
            "times": [self.times(observations, threads) for threads in settings.threads if settings.repeats],
        }
        return plain(report)

    def times(self, observations: Tensor, threads: int) -> dict[str, Any]:
        """Milliseconds per decision at batch 1, and how many times faster than the ordinary sampler, pair by pair."""
        settings = self.settings
        seconds = decision_times(
            list(self.deciders.values()), observations, settings.repeats, threads, progress=self.progress
        )
        found: dict[str, Any] = {"threads": threads}
        for index, name in enumerate(self.deciders):
            median, low, high = ratio_interval(seconds[:, 0] / seconds[:, index], settings.level)
            found[name] = {
                "milliseconds": float(np.median(seconds[:, index]) * 1e3),
                "faster": {"value": median, "low": low, "high": high, "level": settings.level},
            }
        return found


def _arrays(episodes: Episodes) -> dict[str, np.ndarray]:
    return {field.name: getattr(episodes, field.name) for field in fields(Episodes)}


def draw_seed(seed: int, number: int, place: int) -> int:
    """Seed of a method's draws at an observation; no decision of an episode has it."""
    return (1 << 62) + decision_seed(seed, (number << 12) + place)


def paired_difference(first: np.ndarray, second: np.ndarray, level: float) -> dict[str, float]:
    """Difference of two shares over the same episodes, with the score interval of Tango (Stat. Med. 17, 1998)."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    count = len(first)
    gained, lost = int((first & ~second).sum()), int((~first & second).sum())
    limit = norm.ppf((1 + level) / 2)

    def score(difference: float) -> float:
        a = 2 * count
        b = -gained - lost + (2 * count - gained + lost) * difference
        c = -lost * difference * (1 - difference)
        share = (np.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = count * (2 * share + difference * (1 - difference))
        return (gained - lost - count * difference) / np.sqrt(max(variance, 1e-12))

    value = (gained - lost) / count
    edge = 1 - 1e-9
    low = -1.0 if score(-edge) < limit else brentq(lambda d: score(d) - limit, -edge, value)
    high = 1.0 if score(edge) > -limit else brentq(lambda d: score(d) + limit, value, edge)
    return {"value": value, "low": float(low), "high": float(high), "level": level}
