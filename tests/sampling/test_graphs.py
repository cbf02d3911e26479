"""Rounds of fixed shapes and their capture: same images, no wait for the device, errors.

A machine without a GPU plays the captured rounds eagerly: what a capture needs (fixed shapes, no host synchronisation,
calls before it that change nothing) is checked here, the capture itself by the tests marked ``gpu``.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from analytic import BiasedDrafter, GaussianTarget

from free_kernels import DDPMSchedule, FrozenDrafter, ancestral_sample, sample
from free_kernels.sampling import ancestral as ordinary
from free_kernels.sampling import round as rounds
from free_kernels.sampling.cuda_graphs import CapturedCalls, row_bucket
from free_kernels.sampling.job import make_job
from free_kernels.sampling.options import Options
from free_kernels.sampling.speculative import Speculation

LABELS = torch.arange(7) % 3
STEPS = DDPMSchedule(15)
SETTINGS = [(1.0, False), (2.0, False), (1.0, True), (2.0, True)]


class PlayedCalls(CapturedCalls):
    """Calls before the capture, as on a GPU; then every replay runs the function."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.shapes = {}

    def _run_aside(self, key):
        for _ in range(2):
            self._function(key)

    def _capture(self, key):
        holder = []

        def replay():
            found = self._function(key)
            flat = torch.utils._pytree.tree_leaves(found)
            shapes = [x.shape for x in flat if x is not None]
            assert self.shapes.setdefault(key, shapes) == shapes
            holder[:] = [found]

        class Latest:
            def __getattr__(self, name):
                return getattr(holder[0], name)

        return replay, Latest()


def run(target, guidance, slots=None, drafter=None, dense=False, **options):
    drafter = drafter or BiasedDrafter(target, variance_bias=0.1 if target.learns_variance else 0.0)
    manner = {"schedule": STEPS, "guidance_scale": guidance, "seed": 5, "draft_length": 4, "max_slots": slots}
    job = make_job("sample", target, LABELS, Options(drafter=drafter, **manner, **options))
    speculation = Speculation(job, dense=dense)
    with torch.no_grad():
        speculation.run()
    return speculation


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("slots", [1, 3, 7])
@pytest.mark.parametrize(("guidance", "learned"), SETTINGS)
def test_dense_and_captured_rounds_give_the_ragged_rounds_images(monkeypatch, guidance, learned, slots, block):
    monkeypatch.setattr(rounds, "CapturedCalls", PlayedCalls)
    monkeypatch.setattr("free_kernels.sampling.speculative.check_cuda_graphs", lambda where, wanted, device: wanted)
    target = GaussianTarget(learns_variance=learned)
    manner = {"verification": "block" if block else "token"}
    ragged = run(target, guidance, slots, **manner)
    for options in ({"dense": True}, {"cuda_graphs": True}):
        fixed = run(target, guidance, slots, **manner, **options)
        torch.testing.assert_close(fixed.samples, ragged.samples, rtol=1e-5, atol=1e-5)
        for figure in ("rounds_per_image", "tested_by_step", "accepted_by_step", "target_calls", "target_rows"):
            np.testing.assert_array_equal(getattr(fixed.stats, figure), getattr(ragged.stats, figure))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_captured_step_gives_the_ordinary_images(monkeypatch, guidance):
    target = GaussianTarget(learns_variance=True)
    settings = {"schedule": STEPS, "guidance_scale": guidance, "seed": 3}
    want = ancestral_sample(target, LABELS, **settings).samples
    monkeypatch.setattr(ordinary, "CapturedCalls", OneStep)
    monkeypatch.setattr("free_kernels.sampling.api.check_cuda_graphs", lambda where, wanted, device: wanted)
    got = ancestral_sample(target, LABELS, max_slots=3, cuda_graphs=True, **settings).samples
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


class OneStep(PlayedCalls):
    """A step's result is a bare tensor."""

    def __call__(self, key):
        if key not in self._captured:
            self._warm_up(key)
            self._captured[key] = ()
        return self._function(key)


def test_a_non_finite_output_is_named_in_dense_rounds_too():
    target = GaussianTarget()
    whole = target.features

    def broken(x, t, y):
        h = whole(x, t, y)
        return torch.where((t == STEPS.timesteps[6])[:, None, None] & (y == 1)[:, None, None], torch.nan, h)

    target.features = broken
    with pytest.raises(FloatingPointError, match="the target's output must be finite.* at step 6 of image [14]"):
        run(target, 1.0, drafter=FrozenDrafter(), dense=True)


def on_meta(speculation: Speculation) -> Speculation:
    """The same run on tensors without values: whatever looks at one raises."""

    def move(holder, names):
        for name in names:
            if isinstance(getattr(holder, name), torch.Tensor):
                object.__setattr__(holder, name, getattr(holder, name).to("meta"))

    slots, job = speculation.slots, speculation.job
    move(slots, list(vars(slots)))
    move(speculation.run_stats, ["deviation", "bias"])
    move(speculation.rounds.refused, list(vars(speculation.rounds.refused)))
    move(slots.pool, ["samples", "labels", "indices", "queue"])
    move(job, ["labels", "timesteps", "table"])
    move(job.target, ["means", "stds", "tilt", "alphas"])
    return speculation


@pytest.mark.parametrize(("guidance", "learned"), SETTINGS)
def test_a_round_waits_for_nothing(guidance, learned):
    class Peeking(FrozenDrafter):
        repeats_feature = False

        def __call__(self, feature, previous, state, t, y):
            return feature if state.sum() > 0 else 2 * feature

    for drafter, waits in ((FrozenDrafter(), False), (Peeking(), True)):
        one = on_meta(run(GaussianTarget(learns_variance=learned), guidance, drafter=drafter, dense=True))
        with torch.no_grad():
            if waits:
                with pytest.raises(RuntimeError, match="meta"):
                    one.rounds.play_on_device(4, 12)
            else:
                assert one.rounds.play_on_device(4, 12).report.shape == (4 * len(LABELS) + 1,)
                assert one.rounds.play_on_device(1, 7).report.device.type == "meta"


def test_buckets_hold_their_rows_and_are_few():
    for most in (1, 5, 6, 48, 512):
        buckets = [row_bucket(rows, most) for rows in range(1, most + 1)]
        assert all(rows <= bucket <= most for rows, bucket in enumerate(buckets, 1))
        assert len(set(buckets)) <= 8
        assert buckets[-1] == most


def test_cuda_graphs_need_cuda():
    for sampler in (sample, ancestral_sample):
        with pytest.raises(ValueError, match="cuda_graphs must be False for a target on cpu, got True"):
            sampler(GaussianTarget(), LABELS, schedule=STEPS, cuda_graphs=True)
        with pytest.raises(TypeError, match="cuda_graphs must be a bool"):
            sampler(GaussianTarget(), LABELS, schedule=STEPS, cuda_graphs=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("guidance", "drafter"), [(1.0, "bundled"), (2.0, "bundled"), (1.0, "frozen")])
def test_captured_rounds_on_a_gpu(guidance, drafter):
    from free_dit import load_bundled

    target, learned = load_bundled("digits")
    target.module.to("cuda")
    learned.to("cuda")
    labels = torch.arange(10, device="cuda")
    settings = {"schedule": DDPMSchedule(50), "guidance_scale": guidance, "max_slots": 4, "seed": 2}
    chosen = learned if drafter == "bundled" else drafter
    want = sample(target, labels, drafter=chosen, **settings)
    got = sample(target, labels, drafter=chosen, cuda_graphs=True, **settings)
    torch.testing.assert_close(got.samples, want.samples, rtol=1e-3, atol=1e-3)
    assert (got.stats.rounds_per_image == want.stats.rounds_per_image).mean() > 0.7
    ordinary_images = [ancestral_sample(target, labels, cuda_graphs=g, **settings).samples for g in (False, True)]
    torch.testing.assert_close(*ordinary_images, rtol=1e-3, atol=1e-3)
