"""The scale model: its chain of rounds against simulation and real runs, its times in their limits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm

import free_dit
from free_dit import cli, load_bundled
from free_dit.experiments.scale.chain import CommitChain, acceptance_of_stats, acceptance_table
from free_dit.experiments.scale.link import link_cost
from free_dit.experiments.scale.measure import AcceptanceCounts, HollowTarget, rest_of_rounds
from free_dit.experiments.scale.page import build_report, render, write_report
from free_dit.experiments.scale.prediction import (
    Inputs,
    Layout,
    call_seconds,
    choices,
    crossover,
    layouts,
    predict,
    read_inputs,
    sweep,
    write_inputs,
)
from free_dit.markdown import fill_page
from free_kernels import DDPMSchedule, sample
from free_kernels.protocols import first_drafted_step

CONFIGS = Path(free_dit.__file__).parent / "configs"
# Two-sided, one false alarm in a million of each statistical check.
BOUND = float(norm.isf(0.5e-6))


def inputs(**changes) -> Inputs:
    """No overheads: a call costs 1 and every further row 0.2, a drafting pass 0.1."""
    plain = {
        "origin": "test",
        "measured": False,
        "num_steps": 49,
        "branches": 1,
        "target": ((1, 1.0), (11, 3.0)),
        "draft": ((1, 0.1),),
        "round_base": 0.0,
        "round_row": 0.0,
        "round_draft": 0.0,
        "step_base": 0.0,
        "step_row": 0.0,
        "state_bytes": 100,
        "output_bytes": 200,
        "feature_bytes": 1000,
        "link_latency": 0.0,
        "link_bandwidth": 1e9,
        "slowdown": 1.0,
        "acceptance": ((0.9, 0.8), (0.7, 0.5)),
    }
    return Inputs(**(plain | changes))


def simulated(chain: CommitChain, images: int, seed: int, fresh_ahead: bool = True) -> np.ndarray:
    """Rounds ``[images, K]`` that begin at each step, played draft by draft; a wrong player forgets the look-ahead."""
    rng, begun = np.random.default_rng(seed), np.zeros((images, chain.num_steps), np.int64)
    for image in range(images):
        step = 0
        while step < chain.num_steps:
            begun[image, step] = 1
            rows = 1 if step == 0 and not chain.first_step else min(chain.length, chain.num_steps - step)
            row = 0
            while row < rows - 1:
                ahead = min(row, chain.acceptance.shape[1] - 1) if fresh_ahead else 0
                row += 1
                if rng.random() > chain.acceptance[step + row - 1, ahead]:
                    row -= 1
                    break
            step += row + 1
    return begun


@pytest.mark.parametrize("first_step", [False, True])
@pytest.mark.parametrize(("length", "num_steps"), [(1, 9), (2, 20), (6, 31), (31, 31)])
def test_rounds_agree_with_simulation(length, num_steps, first_step):
    rng = np.random.default_rng(length)
    chain = CommitChain(rng.uniform(0.5, 1.0, (num_steps, 4)) * [1, 0.95, 0.9, 0.85], length, first_step)
    np.testing.assert_allclose(chain.transition.sum(1), 1.0)
    images = 4000
    rounds = simulated(chain, images, 1).sum(1)
    error = rounds.std(ddof=1) / np.sqrt(images)
    assert abs(rounds.mean() - chain.rounds) <= BOUND * error + 1e-9
    # The whole law of an image's rounds, and the slowest of eight images.
    share = np.mean(rounds[:, None] > np.arange(num_steps), axis=0)
    law = chain.profile[:, 0]
    assert (np.abs(share - law) <= (BOUND + 1) * np.sqrt(law * (1 - law) / images) + 1e-3).all()
    slowest = rounds.reshape(-1, 8).max(1)
    assert abs(slowest.mean() - chain.rounds_of_slowest(8)) <= BOUND * slowest.std() / np.sqrt(len(slowest)) + 1e-9
    np.testing.assert_allclose(chain.profile[:, 0].sum(), chain.rounds)
    np.testing.assert_allclose(chain.profile.sum(0) / chain.rounds, chain.drafting)
    if length == 6:
        wrong = simulated(chain, images, 1, fresh_ahead=False).sum(1)
        assert abs(wrong.mean() - chain.rounds) > BOUND * error


def test_limits_of_the_chain():
    perfect = CommitChain(np.ones((49, 1)), 6)
    assert perfect.rounds == pytest.approx(1 + 48 / 6)
    assert CommitChain(np.zeros((49, 1)), 6).rounds == pytest.approx(49)
    assert CommitChain(np.full((49, 1), 0.5), 1).rounds == pytest.approx(49)
    # Far from both ends a round commits 1 + a + ... + a^(L - 1) steps.
    long = CommitChain(np.full((800, 1), 0.8), 5)
    assert long.call_reduction == pytest.approx(sum(0.8**j for j in range(5)), rel=1e-2)


@pytest.mark.parametrize("length", [2, 6, 31])
def test_probabilities_of_a_chain_lie_between_0_and_1(length):
    """Sums of rounded products end above 1 in some order of summation: many chains meet it on any machine."""
    rng = np.random.default_rng(3)
    for _ in range(40):
        chain = CommitChain(rng.uniform(0.0, 1.0, (31, 4)), length, first_step=True)
        for values in (chain.visits, chain.profile, chain.drafting, chain.transition):
            assert values.min() >= 0
            assert values.max() <= 1


def test_acceptance_from_tables_and_stats():
    np.testing.assert_array_equal(acceptance_table(np.array([[0.1], [0.2]]), 5)[:, 0], [0.1, 0.1, 0.1, 0.2, 0.2])
    by_step = np.array([np.nan, 0.8, np.nan, 0.6, np.nan])
    np.testing.assert_allclose(acceptance_of_stats(by_step)[:, 0], [0.8, 0.8, 0.7, 0.6, 0.6])
    with pytest.raises(ValueError, match="^acceptance_of_stats: by_step must be known"):
        acceptance_of_stats(np.full(3, np.nan))
    with pytest.raises(ValueError, match="^acceptance_table: acceptance must be probabilities"):
        acceptance_table(np.array([[1.2]]), 5)


def test_one_process_is_the_plain_formula():
    """Free of the mesh: an image at batch 1 pays its calls and drafting passes, an ordinary one its steps."""
    given = inputs(round_base=0.05, round_row=0.01, round_draft=0.02, step_base=0.03, step_row=0.01)
    chain = given.chain(6)
    by_hand = sum(
        visit * (1 + 0.2 * (rows - 1) + 0.05 + 0.01 * rows + (rows - 1) * (0.1 + 0.02))
        for visit, rows in zip(chain.visits, chain.rows, strict=True)
    )
    found = predict(given, Layout(1, 1), 1, chain)
    assert found.latency_s == pytest.approx(by_hand)
    assert found.images_per_s == pytest.approx(1 / by_hand)
    assert predict(given, Layout(1, 1), 1, given.chain(1)).latency_s == pytest.approx(49 * 1.04)
    for rows in (1.0, 5.0, 40.0):
        assert call_seconds(given, rows, 1) == pytest.approx(1 + 0.2 * (rows - 1))


def test_guidance_is_twice_the_network_rows():
    plain, guided = inputs(), inputs(branches=2)
    assert predict(guided, Layout(1, 1), 3, guided.chain(1)).latency_s == pytest.approx(
        predict(plain, Layout(1, 1), 6, plain.chain(1)).latency_s
    )


def test_no_link_no_verify_parallel():
    given = inputs(link_bandwidth=0.0)
    best = choices(sweep(given, (4,), (1, 16), (2, 6)), "latency_s")
    assert all(choice.by_kind["verify"] == choice.by_kind["mixed"] == 0 for choice in best)
    assert all(choice.by_kind["data"] > 0 and choice.speculative.verify == 1 for choice in best)
    # One row stays at home, and costs no message.
    assert call_seconds(given, 1.0, 4) == pytest.approx(1.0)


def test_a_free_link_shares_the_rows():
    given = inputs(link_bandwidth=float("inf"))
    for rows, verify, share in ((6, 2, 3), (6, 4, 2), (6, 64, 1), (96, 8, 12)):
        assert call_seconds(given, float(rows), verify) == pytest.approx(1 + 0.2 * (share - 1))
    slow = replace(given, link_latency=0.5)
    # Order, state and condition there, told and output back, features: six messages in a row.
    assert call_seconds(slow, 6.0, 2) == pytest.approx(call_seconds(given, 6.0, 2) + 6 * 0.5)


@pytest.mark.parametrize("acceptance", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("goal", ["latency_s", "images_per_s"])
def test_rows_at_full_price_never_pay_on_one_device(acceptance, goal):
    given = inputs(target=((1, 1.0), (2, 2.0)), draft=((1, 0.01),), acceptance=((acceptance,),))
    for choice in choices(sweep(given, (1,), (1, 4, 64)), goal):
        assert choice.speed_up < 1
    # Two devices win nothing for the ordinary chain at batch 1, and much for packed rows.
    (choice,) = choices(sweep(replace(given, link_bandwidth=1e12), (8,), (1,)), goal)
    assert choice.speed_up > 1.3
    assert choice.speculative.verify > 1


def test_perfect_drafts_and_free_rows_win_the_draft_length():
    given = inputs(num_steps=1 + 6 * 40, target=((1, 1.0),), draft=((1, 0.0),), acceptance=((1.0,),))
    for batch in (1, 16):
        ordinary = predict(given, Layout(1, 1), batch, given.chain(1))
        found = predict(given, Layout(1, 1), batch, given.chain(6))
        for ratio in (ordinary.latency_s / found.latency_s, found.images_per_s / ordinary.images_per_s):
            assert ratio == pytest.approx(241 / 41)


def test_crossover():
    assert crossover((1, 2, 4, 8), (2.0, 1.5, 0.9, 0.8)) == 4
    assert crossover((1, 2, 4, 8), (2.0, 0.9, 1.1, 1.2)) is None
    assert crossover((1, 2, 4, 8), (2.0, 0.9, 1.1, 1.0)) == 8
    assert crossover((1, 2), (0.5, 0.4)) == 1


def test_crossover_moves_with_acceptance_row_price_and_gpus():
    batches = tuple(2**i for i in range(11))

    def of(given: Inputs, gpus: int = 1) -> float:
        found = choices(sweep(given, (gpus,), batches), "images_per_s")
        return crossover(batches, [choice.speed_up for choice in found]) or np.inf

    def saturating(knee: float) -> Inputs:
        return inputs(target=((1, 1.0), (knee, 1.3), (2 * knee, 2.6)), acceptance=((0.85,),))

    by_acceptance = [of(inputs(acceptance=((a,),))) for a in (0.3, 0.6, 0.85, 0.97)]
    by_knee = [of(saturating(knee)) for knee in (8, 32, 128)]
    by_gpus = [of(saturating(8), gpus) for gpus in (1, 2, 8)]
    for values in (by_acceptance, by_knee, by_gpus):
        assert values == sorted(values)
        assert values[0] < values[-1]


def test_every_mesh_is_tried():
    assert [tuple(layout) for layout in layouts(6)] == [(6, 1), (3, 2), (2, 3), (1, 6)]
    assert [layout.kind for layout in (Layout(1, 1), Layout(4, 1), Layout(1, 4), Layout(2, 2))] == [
        "single",
        "data",
        "verify",
        "mixed",
    ]
    # More groups than images: the rest idle.
    given = inputs()
    assert predict(given, Layout(8, 1), 2, given.chain(4)).latency_s == pytest.approx(
        predict(given, Layout(2, 1), 2, given.chain(4)).latency_s
    )


@pytest.mark.slow
def test_call_reduction_of_the_bundled_pair():
    """Within a bound from the standard errors of both runs, and one percent for what the model leaves out."""
    target, drafter = load_bundled("digits")
    num_steps, images = 80, 40
    labels, schedule = torch.arange(images) % 10, DDPMSchedule(num_steps)

    def run(length: int, seed: int, callback=None):
        settings = {"schedule": schedule, "drafter": drafter, "draft_length": length, "seed": seed}
        return sample(target, labels, callback=callback, **settings).stats

    counts = AcceptanceCounts(num_steps, 8, first_drafted_step(drafter))
    calibrating = run(8, 11, counts)
    # The callback sees what the run counts.
    np.testing.assert_array_equal(counts.tested.sum(1), calibrating.tested_by_step)
    np.testing.assert_array_equal(counts.accepted.sum(1), calibrating.accepted_by_step)
    table = acceptance_table(counts.table(), num_steps)
    for length, stats in ((8, calibrating), (4, run(4, 12))):
        rounds = stats.rounds_per_image
        errors = [r.std(ddof=1) / np.sqrt(images) / r.mean() for r in (rounds, calibrating.rounds_per_image)]
        tolerance = BOUND * np.hypot(*errors) + 0.01
        predicted = CommitChain(table, length, counts.first == 0).call_reduction
        assert abs(predicted / stats.call_reduction - 1) <= tolerance
        assert tolerance < 0.15
        # A table that is too good is found out.
        better = CommitChain(np.maximum(table, 0.97), length, counts.first == 0).call_reduction
        assert abs(better / stats.call_reduction - 1) > tolerance


def test_link_cost_recovers_a_link():
    sizes = np.array([8.0, 1e3, 1e5, 1e7])
    latency, bandwidth = link_cost(sizes, 3e-5 + sizes / 2e9)
    assert latency == pytest.approx(3e-5)
    assert bandwidth == pytest.approx(2e9)
    assert link_cost(sizes, np.full(4, 1e-5))[1] == float("inf")


def test_rest_of_rounds_computes_no_network():
    target, _ = load_bundled("digits")
    hollow = HollowTarget(target, 4)
    assert hollow.features(torch.zeros(3), None, None).shape == (3, *target.feature_shape)
    assert hollow.head(torch.zeros(3), None, None).shape == (3, 2, 8, 8)
    found = rest_of_rounds(target, 1.0, 1)
    assert set(found) == {"round_base", "round_row", "round_draft", "step_base", "step_row"}
    assert all(0 <= value < 1 for value in found.values())
    assert found["round_base"] + found["round_draft"] + found["round_row"] > 0


def test_files_and_report(tmp_path):
    write_inputs(tmp_path / "in.json", inputs(), {"turns": 3})
    assert read_inputs(tmp_path / "in.json") == (inputs(), {"turns": 3})
    report = build_report(inputs(), {}, (1, 2), (1, 8, 64), (2, 4))
    page, figures, picture = write_report(report, tmp_path, "scale")
    assert "**Not measured" in page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    kept = json.loads(figures.read_text())
    assert len(kept["choices"]["latency_s"]) == 6
    assert set(kept["crossover"]["images_per_s"]["2"]) == {"best", "data", "verify"}
    assert "Model from measured inputs" in render(build_report(inputs(measured=True), {}, (1,), (1,), (2,)))
    text = tmp_path / "page.md"
    text.write_text("a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n")
    fill_page(text, "x", "new")
    assert text.read_text() == "a\n<!-- x: begin -->\nnew\n<!-- x: end -->\nb\n"
    with pytest.raises(ValueError, match="^fill_page: page must hold <!-- y: begin -->"):
        fill_page(text, "y", "new")


@pytest.mark.parametrize("side", [256, 512])
def test_the_shipped_what_ifs_say_that_they_are(side):
    given, _ = read_inputs(CONFIGS / f"scale_dit_xl_{side}.toml")
    assert not given.measured
    assert given.origin.startswith("what-if")
    assert call_seconds(given, 6.0) / call_seconds(given, 1.0) == pytest.approx({256: 1.9, 512: 4.7}[side], rel=2e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branches": 3}, "^scale_model: branches must be"),
        ({"target": ((2, 1.0), (1, 2.0))}, "^scale_model: target must be .* ascending rows"),
        ({"slowdown": 0.5}, "^scale_model: slowdown must be"),
        ({"link_bandwidth": -1.0}, "^scale_model: link_bandwidth must be"),
        ({"acceptance": ((1.5,),)}, "^acceptance_table: acceptance must be"),
    ],
)
def test_wrong_inputs_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        inputs(**changes)


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="^read_inputs: measurements must be an existing"):
        read_inputs(tmp_path / "none.json")
    path = tmp_path / "in.toml"
    for text, message in (("a = [", "must be JSON or TOML"), ("a = 1", "must have the keys")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"^read_inputs: .*{message}"):
            read_inputs(path)


def test_command_line(tmp_path, capsys, monkeypatch):
    def run(*arguments: object) -> None:
        monkeypatch.setattr("sys.argv", ["free_dit", "scale-model", *map(str, arguments)])
        cli.main()

    run("--out", tmp_path / "out", "--measurements", CONFIGS / "scale_dit_xl_256.toml", "--max-gpus", 2)
    assert "**Not measured" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "scale_dit_xl_256.md",
        "scale_dit_xl_256-figures.json",
        "scale_dit_xl_256.png",
    }
    with pytest.raises(SystemExit) as ended:
        run("--out", tmp_path / "out", "--measurements", tmp_path / "none.json")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: read_inputs: measurements must be an existing")
