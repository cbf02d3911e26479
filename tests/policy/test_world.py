"""The reaching task: its physics, its scenes, and a planner that takes either side."""

from __future__ import annotations

import numpy as np
import pytest

from free_dit.policy.planner import GOOD, demonstrate, side_of, tight_paths
from free_dit.policy.rollout import EXECUTED
from free_dit.policy.task import HISTORY, HORIZON, OBSERVATION_SIZE, Windows, chunk_of, observe, targets_of
from free_dit.policy.world import (
    AGENT_RADIUS,
    APART,
    FREE,
    GOAL_TOLERANCE,
    MAX_SPEED,
    MAX_STEPS,
    RESPONSE,
    Scenes,
    World,
    clearance,
    random_scenes,
)


def one_scene(centre=(0.0, 0.0), radius=0.2, start=(-0.8, 0.0), goal=(0.8, 0.0)) -> Scenes:
    return Scenes(*(np.array([part], dtype=float) for part in (start, goal, centre, radius)))


@pytest.fixture(scope="module")
def shown():
    return demonstrate(random_scenes(300, 5), 5)


def test_scenes_depend_on_seed_and_number_only():
    many, few = random_scenes(100, 3), random_scenes(7, 3)
    for name in ("start", "goal", "centre", "radius"):
        assert np.array_equal(getattr(many, name)[:7], getattr(few, name))
    assert not np.array_equal(random_scenes(7, 4).start, few.start)
    assert len(np.unique(many.start[:, 0])) == 100


def test_scenes_are_open():
    scenes = random_scenes(200, 0)
    assert (np.linalg.norm(scenes.goal - scenes.start, axis=1) >= APART).all()
    for point in (scenes.start, scenes.goal):
        assert (clearance(scenes, point) >= FREE - AGENT_RADIUS).all()
    # The obstacle is in the way: straight on there is contact.
    straight = scenes.start[:, None] + np.linspace(0, 1, 100)[:, None] * (scenes.goal - scenes.start)[:, None]
    assert (clearance(scenes, straight).min(axis=1) < 0).all()


def test_speed_is_bounded_and_rises_as_a_lag():
    world, speeds = World(one_scene(centre=(5.0, 5.0))), []
    for _ in range(12):
        world.step(np.array([[10.0, 0.0]]))
        speeds.append(np.linalg.norm(world.velocity))
    expected = MAX_SPEED * (1 - (1 - RESPONSE) ** np.arange(1, 13))
    np.testing.assert_allclose(speeds, expected, rtol=1e-12)
    np.testing.assert_allclose(world.position[0], [-0.8 + expected.sum(), 0.0], rtol=1e-12, atol=1e-15)


def test_a_near_target_is_approached_without_the_bound():
    world = World(one_scene(centre=(5.0, 5.0)))
    world.step(world.position + [[0.01, 0.0]])
    np.testing.assert_allclose(world.velocity, [[RESPONSE * 0.01, 0.0]])


def test_contact_ends_an_episode():
    world, last = World(one_scene()), None
    for _ in range(MAX_STEPS):
        last = world.position
        world.step(world.scenes.goal)
    assert world.hit[0]
    assert not world.reached[0]
    assert clearance(world.scenes, world.position)[0] < 0
    assert world.steps[0] < MAX_STEPS
    assert np.array_equal(last, world.position), "nothing moves after the end"


def test_the_goal_and_time_end_an_episode():
    free = World(one_scene(centre=(5.0, 5.0)))
    waiting = World(one_scene())
    for _ in range(MAX_STEPS + 3):
        free.step(free.scenes.goal)
        waiting.step(waiting.position)
    assert free.reached[0]
    assert np.linalg.norm(free.position - free.scenes.goal) < GOAL_TOLERANCE
    # 1.6 less the tolerance at full speed, plus the lag: the missing speed of the first steps, 0.4 / 0.6 of a step.
    assert free.steps[0] == int(np.ceil((1.6 - GOAL_TOLERANCE) / MAX_SPEED + (1 - RESPONSE) / RESPONSE))
    assert waiting.steps[0] == MAX_STEPS
    assert not waiting.running[0]
    assert not waiting.reached[0]


def test_sides_of_a_path():
    scenes = one_scene()
    way = np.linspace(-0.8, 0.8, 50)
    above, below = (np.stack([way, sign * 0.3 * np.cos(way)], axis=1)[None] for sign in (1, -1))
    assert side_of(scenes, above)[0] == 1
    assert side_of(scenes, below)[0] == -1


def test_paths_are_tight():
    """Around one disc: two tangents and an arc of the circle that is kept free."""
    scenes, margin = one_scene(), np.array([0.05])
    kept = 0.2 + AGENT_RADIUS + 0.05
    tangent = np.sqrt(0.8**2 - kept**2)
    shortest = 2 * tangent + kept * (np.pi - 2 * np.arccos(kept / 0.8))
    for side in (1, -1):
        path = tight_paths(scenes, side, margin)
        assert side_of(scenes, path)[0] == side
        length = np.linalg.norm(np.diff(path, axis=1), axis=-1).sum()
        # Points are kept out, pieces between them cut the arc: at 39 pieces a thousandth of the length.
        assert shortest * 0.998 < length < shortest * 1.01


def test_the_planner_succeeds_on_either_side(shown):
    assert shown.reached.mean() > 0.99
    two = shown.choices >= 2
    assert two.mean() > 0.8
    left = (shown.side[two] == 1).mean()
    # Three standard deviations of a fair coin.
    assert abs(left - 0.5) < 3 * 0.5 / np.sqrt(two.sum())
    # In one and the same scene both occur.
    scenes = shown.scenes.take(np.repeat(np.nonzero(two)[0][:10], 12))
    again = demonstrate(scenes, 9).side.reshape(10, 12)
    assert (np.abs(again.sum(axis=1)) < 12).sum() >= 8
    assert GOOD > 1


def test_demonstrations_keep_the_rules(shown):
    way = np.linalg.norm(np.diff(shown.position, axis=1), axis=-1)
    assert way.max() <= MAX_SPEED * (1 + 1e-9)
    assert (clearance(shown.scenes, shown.position)[shown.reached] >= 0).all()
    assert np.array_equal(demonstrate(random_scenes(300, 5), 5).target, shown.target)
    assert not np.array_equal(demonstrate(random_scenes(300, 5), 6).target, shown.target)


def test_windows_are_the_demonstrations(shown):
    windows = Windows(shown)
    assert len(windows) == shown.steps[shown.reached].sum()
    assert windows.observations.shape[1:] == (HISTORY, OBSERVATION_SIZE)
    assert windows.actions.shape[1:] == (HORIZON, 2)
    assert windows.actions.abs().max() < 1, "nothing is cut off"
    # The first windows are those of step 0, where nothing has been seen before.
    first = windows.observations[: int(shown.reached.sum())]
    assert (first[:, 0] == first[:, 1]).all()
    assert (first[:, :, :2] == 0).all()
    # A window's chunk, carried out, is the demonstration.
    row = int(np.nonzero(shown.reached)[0][0])
    world = World(shown.scenes.take(np.array([row])))
    planned = targets_of(world.scenes, windows.actions[:1].numpy(), world.position)
    for step in range(EXECUTED):
        world.step(planned[:, step])
    np.testing.assert_allclose(world.position[0], shown.position[row, EXECUTED], atol=1e-6)


def test_observations_and_chunks_do_not_depend_on_the_frame():
    """Shifted and turned, a scene looks the same, and the same chunk leads to the turned targets."""
    scenes, velocity = one_scene(centre=(0.1, 0.05)), np.array([[0.025, 0.01]])
    seen = observe(scenes, scenes.start, velocity)
    np.testing.assert_allclose(seen[0], [0.5, 0.2, 1.6, 0.9, 0.05, 0.2 / 0.28], rtol=1e-6)
    angle = 0.7
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = Scenes(*(part @ turn.T + 0.3 for part in (scenes.start, scenes.goal, scenes.centre)), scenes.radius)
    np.testing.assert_allclose(observe(moved, moved.start, velocity @ turn.T), seen, atol=1e-6)
    targets = np.random.default_rng(0).uniform(-0.5, 0.5, (1, HORIZON, 2)) + scenes.start
    chunk = chunk_of(scenes, targets, scenes.start)
    np.testing.assert_allclose(targets_of(scenes, chunk, scenes.start), targets, atol=1e-6)
    np.testing.assert_allclose(targets_of(moved, chunk, moved.start), targets @ turn.T + 0.3, atol=1e-6)
    # Negative control: another scene looks otherwise.
    assert np.abs(observe(one_scene(), scenes.start, velocity) - seen).max() > 0.04


def test_errors():
    with pytest.raises(ValueError, match="^random_scenes: count must be"):
        random_scenes(0, 0)
    with pytest.raises(ValueError, match="^demonstrate: seed must be"):
        demonstrate(random_scenes(1, 0), -1)
