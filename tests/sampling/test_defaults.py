"""Torch's default dtype and device have no effect on samples; networks in float64 are sampled as others are."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import free_dit
import free_kernels as fk
from free_kernels.sampling.job import make_job
from free_kernels.sampling.options import Options

LABELS = torch.arange(4)
BACKENDS = ["reference", *(["extension"] if fk.extension.has_extension() else [])]


@contextmanager
def default(dtype: torch.dtype | None = None, device: str | None = None):
    """Other defaults of torch. On the device "meta" a tensor has no values, so none may be made there by default."""
    before = torch.get_default_dtype()
    try:
        if dtype is not None:
            torch.set_default_dtype(dtype)
        if device is not None:
            torch.set_default_device(device)
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


OTHERS = [
    {"dtype": torch.float64},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float16},
    {"device": "meta"},
    {"dtype": torch.bfloat16, "device": "meta"},
]
IDS = ["float64", "bfloat16", "float16", "meta", "bfloat16 on meta"]


def pair(name: str = "digits"):
    return free_dit.load_bundled(name)


def windowed(target, drafter):
    """A drafter of random weights that remembers calls."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = fk.DrafterConfig(width=32, window=2)
        return fk.FeatureDrafter(target.latent_shape, target.feature_shape, target.num_classes, config).eval()


CASES = {
    "token": {"guidance_scale": 2.0},
    "block": {"verification": "block"},
    "relaxed": {"relaxation": 2.0},
    "slots": {"max_slots": 2},
    "frozen": {"drafter": "frozen"},
    "no reuse": {"reuse_refused": False, "drafter": "frozen"},
    "window": {"drafter": windowed},
}


def drawn(case: str, backend: str = "auto") -> Tensor:
    """Samples of a case, with everything that it needs made here."""
    target, drafter = pair()
    options = {"drafter": drafter, "draft_length": 3, "backend": backend} | CASES[case]
    if callable(options["drafter"]) and not isinstance(options["drafter"], torch.nn.Module):
        options["drafter"] = options["drafter"](target, drafter)
    return fk.sample(target, LABELS, schedule=fk.DDPMSchedule(12), seed=1, **options).samples


def unchanged(draw, others) -> None:
    """What is drawn is float32, and bit for bit what it is with torch's own defaults."""
    expected = draw()
    with default(**others):
        found = draw()
    assert found.dtype == expected.dtype == torch.float32
    assert found.device == expected.device
    assert torch.equal(found, expected)


@pytest.mark.parametrize("others", OTHERS, ids=IDS)
@pytest.mark.parametrize("case", [name for name in CASES if name != "window"])
def test_sample(case, others):
    unchanged(lambda: drawn(case), others)


@pytest.mark.parametrize("others", OTHERS, ids=IDS)
def test_sample_in_plain_pytorch(others):
    unchanged(lambda: drawn("token", "reference"), others)


@pytest.mark.parametrize("others", OTHERS, ids=IDS)
def test_a_drafter_with_a_window(others):
    target, _ = pair()
    drafter = windowed(target, None)
    options = {"schedule": fk.DDPMSchedule(12), "drafter": drafter, "draft_length": 3, "seed": 1}
    unchanged(lambda: fk.sample(target, LABELS, **options).samples, others)


@pytest.mark.parametrize("others", OTHERS, ids=IDS)
def test_the_ordinary_samplers(others):
    def draw():
        target, _ = pair()
        parts = [
            fk.ancestral_sample(target, LABELS, schedule=schedule, guidance_scale=2.0, seed=1).samples
            for schedule in (
                fk.DDPMSchedule(6),
                fk.DDIMSchedule(6),
                fk.DDPMSchedule(6, beta_schedule="squaredcos_cap_v2"),
            )
        ]
        return torch.cat(parts)

    unchanged(draw, others)


@pytest.mark.parametrize("others", OTHERS, ids=IDS)
def test_flow_models(others):
    def draw():
        target, drafter = pair("digits_sit")
        return fk.sample(target, LABELS, schedule=fk.FlowSDESchedule(12), drafter=drafter, seed=1).samples

    unchanged(draw, others)


@pytest.mark.parametrize("others", OTHERS, ids=IDS)
def test_images_one_by_one_and_automatic_lengths(others):
    """Automatic lengths follow the clock: they run, and return float32."""

    def draw():
        target, drafter = pair()
        options = {"schedule": fk.DDPMSchedule(12), "drafter": drafter, "seed": 1, "max_slots": 2}
        return torch.stack(
            [image for _, image in sorted(fk.sample_iter(target, LABELS, **options), key=lambda p: p[0])]
        )

    unchanged(draw, others)
    with default(**others):
        target, drafter = pair()
        options = {"schedule": fk.DDPMSchedule(12), "drafter": drafter, "draft_length": "auto"}
        assert fk.sample(target, LABELS, **options).samples.dtype == torch.float32


def test_a_default_changes_what_is_made_by_default():
    """The negative control: a state that takes torch's defaults is found by the comparison above."""

    def draw():
        return fk.ancestral_sample(pair()[0], LABELS, schedule=fk.DDPMSchedule(3)).samples * torch.ones(1)

    with pytest.raises(AssertionError):
        unchanged(draw, {"dtype": torch.float64})
    with default(device="meta"), pytest.raises((RuntimeError, NotImplementedError)):
        torch.equal(draw(), draw())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["token", "block", "frozen", "no reuse", "slots"])
def test_a_float64_network(backend, case):
    """A perfect drafter returns the ordinary sampler's images; others return images of the same law."""
    target, drafter = pair()
    double = fk.DiTTarget(target.module.double())
    assert double.dtype == torch.float64
    options = {"schedule": fk.DDPMSchedule(12), "seed": 1}
    ordinary = fk.ancestral_sample(double, LABELS, **options)
    assert ordinary.samples.dtype == torch.float32
    settings = {"drafter": drafter, "draft_length": 3, "backend": backend} | CASES[case]
    result = fk.sample(double, LABELS, **options, **settings)
    assert result.samples.dtype == torch.float32
    assert result.stats.call_reduction > 1
    one = fk.sample(double, LABELS, **options, **settings | {"draft_length": 1, "verification": "token"}).samples
    scale = settings.get("guidance_scale", 1.0)
    expected = fk.ancestral_sample(double, LABELS, **options, guidance_scale=scale).samples
    # Both round the network's output once, and step in float32; a packed call of float64 rows differs by its spacing.
    torch.testing.assert_close(one, expected, rtol=0, atol=12 * 8 * 2**-23 * float(expected.abs().max()))


def test_a_float64_network_is_rounded_once():
    """The output of a step is the float64 network's, to half a spacing of float32; a float32 network's is not."""
    target, _ = pair()
    double = fk.DiTTarget(target.module.double())
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([900, 10]), torch.tensor([3, 4])
    exact = double.module(x.double(), t, y)
    single = pair()[0].module(x, t, y)
    options = {"schedule": fk.DDPMSchedule(3), "draft_length": 1}
    output, wait = make_job("test", double, y, Options(**options)).verify(x, t, y)
    assert output.dtype == wait().dtype == torch.float32
    assert torch.equal(output, exact.float())
    assert not torch.equal(output, single)


def test_a_float64_output_that_float32_cannot_hold_is_named():
    target, _ = pair()
    module = target.module.double()
    with torch.no_grad():
        module.final_layer.linear.bias.fill_(1e300)
    with pytest.raises(FloatingPointError, match="ancestral_sample: the target's output must be finite"):
        fk.ancestral_sample(fk.DiTTarget(module), LABELS, schedule=fk.DDPMSchedule(3))
