"""The law of whole runs against closed forms, with a drafter that is wrong half of the time.

Each test has negative controls: couplings with a bug (tests/helpers/mutations.py) that the same statistic has to find.
"""

from __future__ import annotations

import mutations
import pytest
import slack_by_matrices
import torch
from analytic import DETECTED, FALSE_ALARM, BiasedDrafter, GaussianTarget, law_p_value
from call_by_call import play_call_by_call

import free_kernels.sampling.round
from free_kernels import DDPMSchedule, PhiloxNoise, ancestral_sample, sample
from free_kernels.ops.coupling import couple, reference

IMAGES = 3000
LABEL = 1


def run(target, schedule, drafter, guidance=1.0, seed=11, **settings):
    labels = torch.full((IMAGES,), LABEL)
    return sample(target, labels, schedule=schedule, drafter=drafter, guidance_scale=guidance, seed=seed, **settings)


def setting(variance: str, steps: int = 8, variance_bias: float = 0.3):
    learned = variance == "learned_range"
    target = GaussianTarget(learns_variance=learned)
    drafter = BiasedDrafter(target, variance_bias=variance_bias if learned else 0.0)
    return target, DDPMSchedule(steps, variance=variance), drafter


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_law_is_the_ordinary_samplers(variance, guidance, uncorrected):
    """Of the drafter's own drafts; with refused rows in ``test_refused_rows``."""
    target, schedule, drafter = setting(variance)
    law = target.final_law(schedule, LABEL, guidance)
    result = run(target, schedule, drafter, guidance)
    assert 0.1 < result.stats.acceptance < 0.8, "the drafter has to be bad enough to exercise reflection"
    assert law_p_value(result.samples, *law, drafter.direction) > FALSE_ALARM


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_closed_form_law_holds_for_the_ordinary_sampler(variance):
    target, schedule, drafter = setting(variance)
    labels = torch.full((IMAGES,), LABEL)
    result = ancestral_sample(target, labels, schedule=schedule, seed=5)
    assert law_p_value(result.samples, *target.final_law(schedule, LABEL), drafter.direction) > FALSE_ALARM


@pytest.mark.parametrize(
    ("variance", "mutation"),
    [
        ("fixed_large", mutations.wrong_reflection_sign),
        ("fixed_large", mutations.fresh_sample_on_rejection),
        ("fixed_large", mutations.draft_kept_on_some_rejections),
        ("fixed_large", mutations.always_accept),
        ("learned_range", mutations.fresh_sample_on_rejection),
        ("learned_range", mutations.draft_kept_on_some_rejections),
        ("learned_range", mutations.target_variance_on_both_sides),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_wrong_couplings_are_found(variance, mutation, monkeypatch, uncorrected):
    target, schedule, drafter = setting(variance)
    torch.manual_seed(0)
    play_call_by_call(monkeypatch)
    monkeypatch.setattr(free_kernels.sampling.round, "couple", mutation)
    result = run(target, schedule, drafter)
    assert law_p_value(result.samples, *target.final_law(schedule, LABEL), drafter.direction) < DETECTED


@pytest.mark.parametrize("bug", [None, "", *slack_by_matrices.BUGS[:2]])
def test_law_of_shared_slack(bug, monkeypatch, uncorrected):
    """The law holds by our formulas and by matrices, where many drafts are reflected; bugs in them are found.

    The others show where variances differ unequally, which ``test_coupling`` looks at.
    """
    target, schedule, drafter = setting("learned_range")
    compare, reflected, infeasible = reference.compare_variances, [], []

    def recorded(*args):
        found = compare(*args) if bug is None else slack_by_matrices.dense(*args, bug)
        infeasible.append(found.infeasible)
        return found

    def counted(*args, **kwargs):
        outcome = couple(*args, **kwargs | {"backend": "reference"})
        if outcome.gap_sq.shape[1]:
            refused, row = mutations._refused(args, outcome)
            row = row.clamp(max=outcome.gap_sq.shape[1] - 1)
            reflected.append(int((refused & ~infeasible[-1][torch.arange(len(row)), row]).sum()))
        return outcome

    monkeypatch.setattr(reference, "compare_variances", recorded)
    play_call_by_call(monkeypatch)
    monkeypatch.setattr(free_kernels.sampling.round, "couple", counted)
    result = run(target, schedule, drafter)
    p_value = law_p_value(result.samples, *target.final_law(schedule, LABEL), drafter.direction)
    if bug:
        assert p_value < DETECTED
    else:
        assert sum(reflected) > IMAGES, "reflections, not direct draws, have to be exercised"
        assert p_value > FALSE_ALARM


class RememberingDrafter(BiasedDrafter):
    """Recalls the noise of drafts that were discarded and turns its bias against it when the step is drafted again.

    Labels tell the images apart. Without its memory it is an ordinary biased drafter.
    """

    def __init__(self, target, schedule, remembers):
        super().__init__(target)
        count, steps = target.num_classes, schedule.num_steps
        self.step_of = {int(t): k for k, t in enumerate(schedule.timesteps)}
        self.table = schedule.table("fixed_small")
        self.remembers = remembers
        self.seen = torch.full((count, steps), float("nan"))
        self.last_step = torch.full((count,), -1)
        self.last_state, self.last_mean = torch.zeros(2, count, target.feature_shape[0])

    def __call__(self, feature, previous, state, t, y):
        axis = torch.from_numpy(self.direction).float()
        step = torch.tensor([self.step_of[int(value)] for value in t])
        x = state.flatten(1)
        follows = (self.last_step[y] == step - 1) & torch.isclose(previous.flatten(1), self.last_state[y]).all(1)
        self.seen[y[follows], step[follows] - 1] = ((x - self.last_mean[y]) @ axis)[follows]
        exact = self.target.features(state, t, y)
        known = self.seen[y, step] if self.remembers else torch.full(y.shape, float("nan"))
        bias = torch.where(known > 0, -self.eps_bias, self.eps_bias) * (1 - self.target.alphas[t]).sqrt()
        eps = exact[..., 0] + bias[:, None] * axis
        self.last_step[y], self.last_state[y] = step, x
        self.last_mean[y] = self.table[step, 0:1] * x + self.table[step, 1:2] * eps
        return torch.stack([eps, exact[..., 1]], dim=-1)


@pytest.mark.parametrize("remembers", [False, True])
def test_discarded_noise_must_not_steer_later_drafts(remembers, uncorrected):
    """The contract of a drafter: its arguments and nothing else. One that looked at discarded noise is found."""
    target = GaussianTarget(num_classes=IMAGES)
    for parameter in (target.means, target.stds, target.tilt):
        parameter[:] = parameter[LABEL].clone()
    schedule = DDPMSchedule(8)
    drafter = RememberingDrafter(target, schedule, remembers)
    result = sample(target, torch.arange(IMAGES), schedule=schedule, drafter=drafter, seed=5)
    p_value = law_p_value(result.samples, *target.final_law(schedule, LABEL), drafter.direction)
    assert p_value < DETECTED if remembers else p_value > FALSE_ALARM


class RecallingDrafter(RememberingDrafter):
    """The same with its recollections in a memory that the sampler rewinds; slot and label are the same number."""

    def __init__(self, target, schedule, rewinds):
        super().__init__(target, schedule, remembers=True)
        self.rewinds, self.calls = rewinds, [[] for _ in range(target.num_classes)]

    def new_memory(self, slots, branches, drafts):
        return self

    def __call__(self, feature, previous, state, t, y, memory=None):
        assert memory is self
        for label, value in zip(y.tolist(), t.tolist(), strict=True):
            self.calls[label].append(self.step_of[value])
        return super().__call__(feature, previous, state, t, y)

    def rewind(self, steps):
        for label, count in enumerate(steps.tolist() if self.rewinds else []):
            for step in self.calls[label][len(self.calls[label]) - min(count, len(self.calls[label])) :]:
                self.seen[label, max(step - 1, 0)] = float("nan")
                self.last_step[label] = -1
                self.calls[label].pop()


@pytest.mark.parametrize("rewinds", [True, False])
def test_a_memory_is_rewound_past_discarded_drafts(rewinds):
    """Rewound, recollections leave the law alone; a memory that keeps what it should forget is found."""
    target = GaussianTarget(num_classes=IMAGES)
    for parameter in (target.means, target.stds, target.tilt):
        parameter[:] = parameter[LABEL].clone()
    schedule = DDPMSchedule(8)
    drafter = RecallingDrafter(target, schedule, rewinds)
    result = sample(target, torch.arange(IMAGES), schedule=schedule, drafter=drafter, seed=5)
    p_value = law_p_value(result.samples, *target.final_law(schedule, LABEL), drafter.direction)
    assert p_value > FALSE_ALARM if rewinds else p_value < DETECTED


def test_figures_behind_the_first_refusal_steer_nothing(monkeypatch):
    """Garbage in the rows that exactness forbids to use leaves every image as it was."""
    target, schedule, drafter = setting("learned_range")
    labels = torch.full((300,), LABEL)
    settings = {"schedule": schedule, "drafter": drafter, "max_slots": 130}
    expected = sample(target, labels, **settings).samples

    def poisoned(*args, **kwargs):
        outcome = couple(*args, **kwargs)
        behind = torch.arange(outcome.gap_sq.shape[1]) >= outcome.committed[:, None]
        outcome.gap_sq[behind] = 1e3
        return outcome

    play_call_by_call(monkeypatch)
    monkeypatch.setattr(free_kernels.sampling.round, "couple", poisoned)
    assert torch.equal(sample(target, labels, **settings).samples, expected)


@pytest.mark.parametrize("case", ["clip", "guided channels", "fixed variance of a learned target", "frozen"])
def test_law_in_less_common_settings(case):
    """Clipping that never binds, guidance of the first of two channels, a fixed variance asked of a learned target."""
    latent = (2, 2, 4) if case == "guided channels" else (1, 4, 4)
    target = GaussianTarget(latent_shape=latent, learns_variance=case != "frozen")
    variance = "fixed_large" if case.startswith("fixed") else "auto"
    schedule = DDPMSchedule(8, variance=variance, clip_denoised=case == "clip")
    if case == "clip":
        # Data so far inside [-1, 1] that the clean sample is never clipped; the formula is the clipped one.
        target.means *= 0.02
        target.stds *= 0.02
    drafter = "frozen" if case == "frozen" else BiasedDrafter(target)
    direction = BiasedDrafter(target).direction
    guidance = 2.0 if case == "guided channels" else 1.0
    result = run(target, schedule, drafter, guidance, guidance_channels=1 if case == "guided channels" else None)
    mean, std = target.final_law(schedule, LABEL, guidance)
    if case == "guided channels":
        plain = target.final_law(schedule, LABEL)
        mean[8:], std[8:] = plain[0][8:], plain[1][8:]
    assert result.stats.acceptance < 0.9
    assert law_p_value(result.samples, mean, std, direction) > FALSE_ALARM


@pytest.mark.parametrize("draft_length", [1, 2, 3, 8])
def test_law_for_every_draft_length_and_few_slots(draft_length):
    target, schedule, drafter = setting("learned_range")
    result = run(target, schedule, drafter, draft_length=draft_length, max_slots=701, seed=3 + draft_length)
    assert law_p_value(result.samples, *target.final_law(schedule, LABEL), drafter.direction) > FALSE_ALARM


@pytest.mark.parametrize("variance_bias", [10.0, -200.0])
def test_infeasible_variances_fall_back_to_a_direct_draw(variance_bias, uncorrected):
    """A drafter whose variance is far off, even to underflow, refuses whole rows and stays exact."""
    target = GaussianTarget(learns_variance=True)
    drafter = BiasedDrafter(target, eps_bias=0.2, variance_bias=variance_bias)
    schedule = DDPMSchedule(8)
    result = run(target, schedule, drafter)
    # From step 4 on the learned range is wide: no draft has any slack to share there.
    assert result.stats.accepted_by_step[4:].sum() == 0
    assert result.stats.tested_by_step[4:].sum() > IMAGES
    assert law_p_value(result.samples, *target.final_law(schedule, LABEL), drafter.direction) > FALSE_ALARM


@pytest.mark.parametrize("keyed", [True, False], ids=["fresh noise", "the same noise again"])
@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_law_of_block_verification(variance, keyed, monkeypatch):
    """A block's decision looks at all of its drafts: with new noise every round the law holds, with old noise not."""
    target, schedule, drafter = setting(variance, steps=12, variance_bias=0.1)
    if not keyed:
        draw, uniform, of_round = PhiloxNoise.normal, PhiloxNoise.uniform, PhiloxNoise.of_round
        play_call_by_call(monkeypatch)
        monkeypatch.setattr(PhiloxNoise, "normal", lambda self, i, s, p, shape, rounds=None: draw(self, i, s, p, shape))
        monkeypatch.setattr(PhiloxNoise, "uniform", lambda self, i, s, p, rounds=None: uniform(self, i, s, p))
        monkeypatch.setattr(PhiloxNoise, "of_round", lambda self, *given: of_round(self, *given[:-1], None))
    labels = torch.full((4 * IMAGES,), LABEL)
    result = sample(target, labels, schedule=schedule, drafter=drafter, verification="block", seed=11, draft_length=4)
    p_value = law_p_value(result.samples, *target.final_law(schedule, LABEL), drafter.direction)
    assert p_value > FALSE_ALARM if keyed else p_value < DETECTED


def test_blocks_commit_more_than_tokens(uncorrected):
    """Paired over images: the mean difference in rounds is below 0 by many standard errors. Without refused rows."""
    target, schedule, drafter = setting("learned_range", steps=30, variance_bias=0.05)
    runs = [run(target, schedule, drafter, verification=kind).stats for kind in ("token", "block")]
    difference = runs[1].rounds_per_image - runs[0].rounds_per_image
    assert difference.mean() < -5 * difference.std() / len(difference) ** 0.5
