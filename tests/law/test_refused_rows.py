"""Rows that were refused draft again: what is kept, what it is worth, that it is exact, and how far it may look."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import scipy.stats
import torch
from analytic import DETECTED, FALSE_ALARM, BiasedDrafter, GaussianTarget, PerfectDrafter, SwingingDrafter, law_p_value
from call_by_call import play_call_by_call

from free_kernels import DDPMSchedule, PhiloxNoise, sample
from free_kernels.ops.drafting import FindArguments, correct_features, find_rows
from free_kernels.sampling import draft_sources
from free_kernels.sampling.draft_sources import serving_rows
from free_kernels.sampling.refused_rows import CleanRows, FeatureRows, KeptRound, RefusedRows
from free_kernels.sampling.speculative import Speculation

IMAGES, LABEL = 3000, 1
OFFSETS, LENGTHS, COMMITTED = torch.tensor([0, 4, 6, 6, 9]), torch.tensor([4, 2, 0, 3]), torch.tensor([1, 2, 0, 2])


def a_round(branches: int = 1, shift: float = 0.0) -> tuple[torch.Tensor, ...]:
    """Drafts ``10 slot + row``, features and outputs ``100 branch + packed row``, of lengths 4, 2, 0 and 3."""
    drafts = (10.0 * torch.arange(4).unsqueeze(1) + torch.arange(4) + shift).view(4, 4, 1, 1, 1)
    packed = (100.0 * torch.arange(branches).unsqueeze(1) + torch.arange(9) + shift).flatten()
    drafts, features = drafts.expand(-1, -1, 1, 2, 2).contiguous(), packed.view(-1, 1, 1).expand(-1, 4, 2).contiguous()
    return drafts, features, features.reshape(-1, 2, 2, 2).contiguous()


STEPS = torch.tensor([5, 0, 9, 7])


def kept(branches: int = 1, spoil: float | None = None) -> FeatureRows:
    """After a round from ``STEPS`` with room for four rows; ``spoil`` is what row 2 of slot 0 holds."""
    refused = FeatureRows(4, 4, torch.device("cpu"), branches=branches)
    drafts, features, outputs = a_round(branches)
    if spoil is not None:
        features[2, 0, 0] = spoil
    refused.keep(KeptRound(drafts, features, outputs, OFFSETS, COMMITTED, LENGTHS, STEPS))
    refused.begin(STEPS + COMMITTED)
    return refused


def held(refused: FeatureRows, slot: int, step: int) -> list[float]:
    """The first values of the state, and of each branch's feature, of a slot's row at a step."""
    steps, places = torch.full((4,), step), torch.empty_like(refused.places)
    before, ahead = torch.empty_like(steps), torch.empty_like(steps)
    find_rows(FindArguments(refused._at, steps, places, before, ahead))
    place = int(places[slot, 0])
    assert place >= 0
    # Seen from the step after, it is the row before.
    find_rows(FindArguments(refused._at, steps + 1, places, before, ahead))
    assert before[slot] == place
    return torch.cat([refused.states[place, 0, 0, :1], refused.features[:, place, 0, 0]]).tolist()


@pytest.mark.parametrize("branches", [1, 2])
def test_rows_behind_the_last_committed_one_are_kept_with_it(branches):
    """Slot 0 commits row 0 and keeps it and 1 to 3; slot 1 commits both of its rows; slot 3 has one behind."""
    refused = kept(branches)
    assert refused.ahead.tolist() == [3, 0, 0, 1]
    for slot, first_step, first_draft, first_row, rows in ((0, 5, 0, 0, 4), (1, 1, 11, 5, 1), (3, 8, 31, 7, 2)):
        for j in range(rows):
            said = [100.0 * branch + first_row + j for branch in range(branches)]
            assert held(refused, slot, first_step + j) == [first_draft + j, *said]


def test_rows_of_rounds_before_serve_behind_those_of_the_last():
    """Slot 0's next round is one row and commits it: the rest stay where they are. Idle slots keep theirs."""
    refused = kept()
    drafts, features, outputs = a_round(shift=0.5)
    lengths, offsets, steps = torch.tensor([1, 0, 0, 0]), torch.tensor([0, 1, 1, 1, 1]), STEPS + COMMITTED
    refused.keep(KeptRound(drafts[:, :1].contiguous(), features[:1], outputs[:1], offsets, lengths, lengths, steps))
    refused.begin(steps + lengths)
    assert refused.ahead.tolist() == [2, 0, 0, 1]
    assert [held(refused, 0, step)[0] for step in (6, 7, 8)] == [0.5, 2, 3]
    assert [held(refused, 3, step)[0] for step in (8, 9)] == [31, 32]


def test_rows_of_a_finished_image_are_dropped():
    refused = kept()
    refused.begin(torch.tensor([0, 2, 9, 9]))
    assert refused.ahead.tolist() == [0, 0, 0, 1]
    refused.begin(STEPS + COMMITTED)
    assert refused.ahead.tolist() == [0, 0, 0, 1]
    refused.forget()
    refused.begin(STEPS + COMMITTED)
    assert refused.ahead.tolist() == [0, 0, 0, 0]


def test_fewer_places_than_rows_keep_the_nearest():
    """Two places: the last committed row and the refused one."""
    refused = FeatureRows(4, 2, torch.device("cpu"), branches=1)
    refused.keep(KeptRound(*a_round(), OFFSETS, COMMITTED, LENGTHS, STEPS))
    refused.begin(STEPS + COMMITTED)
    assert refused.ahead.tolist() == [1, 0, 0, 1]
    assert [held(refused, 0, step)[0] for step in (5, 6)] == [0, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_and_those_behind_it_are_not_used(value):
    assert kept(spoil=value).ahead.tolist() == [1, 0, 0, 1]


def test_bytes_are_those_of_slots_times_rows():
    """The figures of the docstrings: DiT-XL/2 in bfloat16, 12 rows and the place of what is not kept."""
    for branches, mebibytes in ((1, 7.515625), (2, 14.828125)):
        refused = FeatureRows(1, 12, torch.device("cpu"), branches=branches)
        features = torch.zeros(branches, 256, 1152, dtype=torch.bfloat16)
        outputs = torch.zeros(branches, 8, 32, 32, dtype=torch.bfloat16)
        one, offsets = torch.ones(1, dtype=torch.int64), torch.tensor([0, 1])
        refused.keep(KeptRound(torch.zeros(1, 1, 4, 32, 32), features, outputs, offsets, one, one, one))
        assert refused.nbytes == mebibytes * 2**20
    for side, mebibytes in ((32, 0.6875), (64, 2.75)):
        job = SimpleNamespace(state_shape=(4, side, side), learned=True)
        assert CleanRows(1, 12, torch.device("cpu"), job=job).nbytes == mebibytes * 2**20 + 24


def test_serving_rows():
    refused = FeatureRows(5, 8, torch.device("cpu"), branches=1)
    refused.counts = [3, 0, 5, 1, 2]
    assert serving_rows(refused, [6, 6, 4, 1, 0], 5) == [3, 0, 3, 0, 0]
    assert serving_rows(refused, None, 5) == [5] * 5


def law(target, schedule, result, drafter, guidance: float = 1.0) -> float:
    return law_p_value(result.samples, *target.final_law(schedule, LABEL, guidance), drafter.direction)


def drawn(target, schedule, drafter, **settings):
    return sample(target, torch.full((IMAGES,), LABEL), schedule=schedule, drafter=drafter, seed=11, **settings)


@pytest.mark.parametrize(
    ("drafter", "guidance"),
    [(SwingingDrafter, 1.0), (SwingingDrafter, 2.0), (BiasedDrafter, 1.0), ("frozen", 1.0)],
)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_law_with_refused_rows(variance, guidance, drafter):
    target = GaussianTarget(learns_variance=variance == "learned_range")
    schedule, used = DDPMSchedule(16, variance=variance), drafter if drafter == "frozen" else drafter(target)
    result = drawn(target, schedule, used, guidance_scale=guidance, draft_length=8)
    assert result.stats.acceptance < 0.95, "drafts have to be refused"
    assert law(target, schedule, result, BiasedDrafter(target), guidance) > FALSE_ALARM


@pytest.mark.parametrize("length", [2, 5, 12, 32])
@pytest.mark.parametrize("dense", [False, True])
def test_law_for_every_length_and_ragged_slots(length, dense, monkeypatch):
    target, schedule = GaussianTarget(learns_variance=True), DDPMSchedule(40)
    if dense:
        monkeypatch.setattr("free_kernels.sampling.api.Speculation", lambda job: Speculation(job, dense=True))
    drafter = SwingingDrafter(target)
    result = drawn(target, schedule, drafter, draft_length=length, max_slots=701)
    assert law(target, schedule, result, drafter) > FALSE_ALARM


def looking_ahead(refused: RefusedRows) -> None:
    """The row at step k + 1 stands at the place of step k: what drafts step k was made with its noise."""
    other = (refused._clean, 1) if isinstance(refused, CleanRows) else (refused._features, 2)
    for buffer, places in ((refused._states, 1), other):
        buffer.narrow(places, 0, refused.held).copy_(buffer.narrow(places, 0, refused.held).roll(-1, places))


@pytest.mark.parametrize("kind", [FeatureRows, CleanRows])
@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_the_row_behind_a_step_must_not_draft_it(variance, kind, monkeypatch):
    target, schedule = GaussianTarget(learns_variance=variance == "learned_range"), DDPMSchedule(16, variance=variance)
    keep = kind.keep

    def keep_one_too_far(self, played):
        keep(self, played)
        looking_ahead(self)

    play_call_by_call(monkeypatch)
    monkeypatch.setattr(kind, "keep", keep_one_too_far)
    drafter = SwingingDrafter(target)
    used = drafter if kind is FeatureRows else "frozen"
    assert law(target, schedule, drawn(target, schedule, used), drafter) < DETECTED


@pytest.mark.parametrize("looks", [False, True])
def test_a_length_must_not_look_at_discarded_rows(looks, monkeypatch):
    """Steps are drawn directly, untested, where a discarded row shows their noise to point along the drafter's error.

    As many steps are drawn directly at random where the length does not look, which changes nothing.
    """
    target, schedule = GaussianTarget(), DDPMSchedule(16)
    drafter, choose = SwingingDrafter(target), Speculation._lengths
    axis = torch.from_numpy(drafter.direction).float()
    coin = torch.Generator().manual_seed(3)

    def chosen(self, now):
        lengths, refused, job = choose(self, now), self.rounds.refused, self.job
        if refused.is_empty:
            return lengths
        at = torch.tensor(now.steps).clamp(max=schedule.num_steps - 1)
        first, second = refused.places[:, 0].clamp(min=0), refused.places[:, 1].clamp(min=0)
        output = job.head(refused.features[0, first], job.timesteps[at], self.slots.labels)
        mean, _ = job.transition(refused.states[first], output, job.table[at])
        noise = (refused.states[second] - mean).flatten(1) @ axis
        direct = noise > 0 if looks else torch.rand(len(noise), generator=coin) < 0.5
        direct &= refused.ahead >= 2
        return [min(length, 1) if stop else length for length, stop in zip(lengths, direct.tolist(), strict=True)]

    monkeypatch.setattr(Speculation, "_lengths", chosen)
    p_value = law(target, schedule, drawn(target, schedule, drafter), drafter)
    assert p_value < DETECTED if looks else p_value > FALSE_ALARM


@pytest.mark.parametrize("keyed", [True, False], ids=["fresh noise", "the same noise again"])
def test_old_rows_and_blocks(keyed, monkeypatch):
    """A block's decision looks at all of its noise: rows of old rounds may draft while noise is new, else they may not.

    With new noise every row is of the past, so even all rows of a round may be kept; it does not pay.
    """
    target, schedule = GaussianTarget(), DDPMSchedule(12, variance="fixed_large")
    begin, draw, uniform = FeatureRows.__init__, PhiloxNoise.normal, PhiloxNoise.uniform
    of_round = PhiloxNoise.of_round

    def all_rows(self, slots, rows, *rest, **settings):
        begin(self, slots, 4, *rest, **settings)

    monkeypatch.setattr(FeatureRows, "__init__", all_rows)
    if not keyed:
        play_call_by_call(monkeypatch)
        monkeypatch.setattr(PhiloxNoise, "normal", lambda self, i, s, p, shape, rounds=None: draw(self, i, s, p, shape))
        monkeypatch.setattr(PhiloxNoise, "uniform", lambda self, i, s, p, rounds=None: uniform(self, i, s, p))
        monkeypatch.setattr(PhiloxNoise, "of_round", lambda self, *given: of_round(self, *given[:-1], None))
    drafter, labels = BiasedDrafter(target), torch.full((4 * IMAGES,), LABEL)
    settings = {"drafter": drafter, "verification": "block", "seed": 11, "draft_length": 4}
    p_value = law(target, schedule, sample(target, labels, schedule=schedule, **settings), drafter)
    assert p_value > FALSE_ALARM if keyed else p_value < DETECTED


def wherever_they_are(given, backend):
    """Rows serve at any distance from the state, as the state before is infinitely far."""
    return correct_features(given._replace(previous=torch.full_like(given.previous, torch.inf)), backend)


@pytest.mark.parametrize("drafter", ["frozen", "swinging"])
@pytest.mark.parametrize("leaves", [True, False])
def test_rows_leave_with_their_image(leaves, drafter, monkeypatch):
    """Images do not depend on the slots; with another image's rows in a slot they do (in law they would not)."""
    target, schedule, begin = GaussianTarget(), DDPMSchedule(20), RefusedRows.begin

    if not leaves:
        # At an image's first steps, what the image before left at each place passes for the row of a step ahead.
        def with_all(self, steps):
            begin(self, steps.clamp(min=1))
            place = (steps.unsqueeze(1) + torch.arange(self.rows - 1)) % self.held
            place += torch.arange(len(steps)).unsqueeze(1) * (self.held + 1)
            young = steps <= 1
            self.places.copy_(torch.where(young.unsqueeze(1), place, self.places))
            self.ahead.copy_(torch.where(young, self.rows - 1, self.ahead))

        play_call_by_call(monkeypatch)
        monkeypatch.setattr(RefusedRows, "begin", with_all)
        # They are far away, and would not be taken for that.
        monkeypatch.setattr(draft_sources, "correct_features", wherever_they_are)
    labels, used = torch.arange(9) % 3, drafter if drafter == "frozen" else SwingingDrafter(target)
    runs = [sample(target, labels, schedule=schedule, drafter=used, max_slots=slots).samples for slots in (9, 2)]
    difference = float((runs[0] - runs[1]).abs().max())
    assert difference < 1e-4 if leaves else difference > 1e-2


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_constant_error_cancels(guidance):
    """A drafter that is off by the same everywhere drafts perfectly after a refusal."""
    target, schedule = GaussianTarget(), DDPMSchedule(40)
    labels, settings = torch.arange(200) % 3, {"schedule": schedule, "guidance_scale": guidance}
    corrected, plain = (
        sample(target, labels, drafter=BiasedDrafter(target), reuse_refused=reuse, **settings).stats.rounds_per_image
        for reuse in (True, False)
    )
    gain = plain - corrected
    assert gain.mean() / gain.std() * len(gain) ** 0.5 > scipy.stats.norm.isf(DETECTED)


def test_a_perfect_drafter_stays_perfect():
    target, schedule = GaussianTarget(), DDPMSchedule(20)
    stats = sample(target, torch.arange(3), schedule=schedule, drafter=PerfectDrafter(target)).stats
    assert stats.acceptance == 1


def test_reuse_refused_is_a_bool():
    with pytest.raises(TypeError, match=r"^sample: reuse_refused must be a bool, got 1"):
        sample(GaussianTarget(), torch.tensor([0]), schedule=DDPMSchedule(4), reuse_refused=1)
