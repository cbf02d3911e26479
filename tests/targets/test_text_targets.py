"""Text-to-image transformers of diffusers as targets: their arithmetic, their conditions, and what is refused."""

from __future__ import annotations

import pytest
import torch
from analytic import PerfectDrafter
from text_modules import TARGETS, TOKENS, call, flux, pixart, sana, sd3, some_texts

import free_kernels
from free_kernels import (
    Conditions,
    DDPMSchedule,
    DrafterConfig,
    FeatureDrafter,
    FlowSDESchedule,
    FluxTarget,
    PixArtTarget,
    SanaTarget,
    SD3Target,
    ancestral_sample,
    check_target,
    sample,
)
from free_kernels.sampling.cuda_graphs import check_capturable
from free_kernels.targets import as_target
from free_kernels.targets.check import difference, rounding_tolerance
from free_kernels.targets.text import cross

pytest.importorskip("diffusers")

# Rows of a packed call: images in another order than stored, with one, two and three rows, and the null condition's.
PLACES = torch.tensor([2, 2, 0, 1, 1, 1, 4, 4, 3])
IMAGES = 4


def bound(target, seed=0):
    """Conditions ``[IMAGES + 1, ...]``, the last of which is the null condition, and the target with them."""
    values = some_texts(target, IMAGES + 1, seed=seed)
    null = {name: leaf[-1] for name, leaf in values.items()}
    given = {name: leaf[:-1] for name, leaf in values.items()}
    return values, target.conditioned(Conditions(given, null))


def rows_of(target, seed=1):
    generator = torch.Generator().manual_seed(seed)
    span = 100_000 if target.family == "flow" else 1000
    x = torch.randn(len(PLACES), *target.latent_shape, generator=generator)
    return x, torch.randint(0, span, (len(PLACES),), generator=generator), PLACES


def schedule_for(target, num_steps=10):
    return FlowSDESchedule(num_steps, shift=3.0) if target.family == "flow" else DDPMSchedule(num_steps)


def bound_of(target, samples, steps):
    """How far two chains may be apart by rounding: each step adds what explains two calls, of a state's size."""
    return steps * rounding_tolerance(target.module, samples.device) * float(samples.abs().max())


class TestArithmetic:
    @pytest.mark.parametrize("name", TARGETS)
    @pytest.mark.parametrize("merge", [False, True])
    def test_features_and_head_are_the_modules_forward(self, name, merge):
        """Several images and rows of them, ragged masks with holes, a null condition with nothing kept."""
        target = TARGETS[name]()
        target.merge = merge
        values, target = bound(target)
        x, t, y = rows_of(target)
        expected = call(target, x, t, {key: leaf[y] for key, leaf in values.items()})
        assert expected.shape == (len(y), (1 + target.learns_variance) * target.latent_shape[0], *x.shape[2:])
        tolerance = rounding_tolerance(target.module, x.device)
        for network in (target, target.hoisted(t.unique(), y.unique())):
            h = network.features(x, t, y)
            assert h.shape == (len(y), *target.feature_shape)
            assert difference(network.head(h, t, y), expected) <= tolerance
        # Conditions, timesteps and states that are told apart.
        assert difference(call(target, x, t, {key: leaf[y.roll(1)] for key, leaf in values.items()}), expected) > 0.01
        assert difference(call(target, x, t.roll(1), {key: leaf[y] for key, leaf in values.items()}), expected) > 0.001

    @pytest.mark.parametrize("name", TARGETS)
    def test_they_are_checked_when_they_are_made(self, name):
        found = check_target(TARGETS[name]())
        assert found.path == ("hoisted" if name.startswith(("pixart", "sana")) else "blocks")
        assert 0 < found.difference <= found.tolerance

    @pytest.mark.parametrize("name", ["pixart", "sd3", "flux", "sana"])
    def test_half_precision(self, name):
        target = TARGETS[name]()
        half = type(target)(target.module.to(torch.bfloat16), latent_shape=target.latent_shape)
        values, half = bound(half)
        x, t, y = rows_of(half)
        assert half.texts.embeds.dtype == torch.bfloat16
        rows = {
            key: leaf[y].to(torch.bfloat16) if leaf.is_floating_point() else leaf[y] for key, leaf in values.items()
        }
        expected = call(half, x.to(torch.bfloat16), t, rows)
        found = half.head(half.features(x, t, y), t, y)
        assert difference(found, expected) <= rounding_tolerance(half.module, x.device)

    @pytest.mark.parametrize("name", ["pixart", "sana"])
    def test_blocks_as_they_are_where_another_attention_is_in_them(self, name):
        """A processor of another kind: no key or value is shared, and the result is still the module's."""
        module = TARGETS[name]().module
        kind = type(module.transformer_blocks[0].attn2.processor)

        class Louder(kind):
            def __call__(self, attention, hidden_states, *arguments, **keywords):
                return 2 * super().__call__(attention, hidden_states, *arguments, **keywords)

        module.transformer_blocks[0].attn2.set_processor(Louder())
        target = as_target("test", module)
        assert check_target(target).path == target._path == "blocks"
        values, target = bound(target)
        x, t, y = rows_of(target)
        expected = call(target, x, t, {key: leaf[y] for key, leaf in values.items()})
        assert difference(target.head(target.features(x, t, y), t, y), expected) <= 1e-5

    def test_a_mask_may_be_left_out(self):
        for target in (TARGETS["pixart"](), TARGETS["sana"]()):
            values = some_texts(target, IMAGES)
            del values["prompt_attention_mask"]
            network = target.conditioned(Conditions(values))
            x, t, _ = rows_of(target)
            y = PLACES.clamp(max=IMAGES - 1)
            expected = call(target, x, t, {key: leaf[y] for key, leaf in values.items()})
            assert difference(network.head(network.features(x, t, y), t, y), expected) <= 1e-5


class TestMutations:
    """Adapters that are wrong in the ways that adapters are, each refused when the target is made."""

    @pytest.mark.parametrize("name", ["pixart", "sd3", "flux", "sana"])
    def test_text_of_the_neighbour_image(self, name, monkeypatch):
        kind, module, shape = parts(name)
        if name in ("pixart", "sana"):
            grouped = kind._grouped
            monkeypatch.setattr(kind, "_grouped", lambda self, y: grouped(self, y.roll(1)))
        else:
            rows = kind._text_of_rows
            monkeypatch.setattr(kind, "_text_of_rows", lambda self, y: rows(self, y.roll(1)))
        refused(kind, module, shape)

    @pytest.mark.parametrize("name", ["pixart", "sana"])
    def test_a_mask_that_is_dropped(self, name, monkeypatch):
        kind, module, shape = parts(name)
        text = cross.text_of_group

        def unmasked(texts, group, project):
            whole = texts._replace(bias=None, is_whole=[True] * 9, lengths=[texts.embeds.shape[1]] * 9)
            return text(whole, group, project)

        monkeypatch.setattr(cross, "text_of_group", unmasked)
        # Found by the comparison, which then takes the blocks as they are.
        assert check_target(kind(module, latent_shape=shape)).path == "blocks"

    @pytest.mark.parametrize("name", ["sd3", "flux"])
    def test_a_head_without_the_pooled_text(self, name, monkeypatch):
        kind, module, shape = parts(name)
        conditioning, head = kind._conditioning, kind.head

        def without(self, h, t, y):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(kind, "_conditioning", lambda self, t, y: self._time_embedding(t))
                return head(self, h, t, y)

        monkeypatch.setattr(kind, "head", without)
        refused(kind, module, shape)
        assert kind._conditioning is conditioning

    @pytest.mark.parametrize("name", ["pixart", "sd3", "flux", "sana"])
    def test_a_timestep_of_another_row(self, name, monkeypatch):
        kind, module, shape = parts(name)
        head = kind.head
        monkeypatch.setattr(kind, "head", lambda self, h, t, y: head(self, h, t.roll(1), y))
        refused(kind, module, shape)

    @pytest.mark.parametrize("name", ["sd3", "flux", "sana"])
    def test_a_velocity_the_other_way(self, name, monkeypatch):
        kind, module, shape = parts(name)
        head = kind.head
        monkeypatch.setattr(kind, "head", lambda self, h, t, y: -head(self, h, t, y))
        refused(kind, module, shape)


def parts(name):
    """Class, a module that has not been compared yet, and shape."""
    target = TARGETS[name]()
    module = {"pixart": pixart, "sd3": sd3, "flux": flux, "sana": sana}[name]()
    return type(target), module, target.latent_shape


def refused(kind, module, shape):
    """The mutation is found by the comparison, and nothing else is wrong."""
    with pytest.raises(ValueError, match=f"^{kind.__name__}: module must be a network "):
        kind(module, latent_shape=shape)


class TestSampling:
    @pytest.mark.parametrize("name", TARGETS)
    @pytest.mark.parametrize("guidance", [1.0, 2.0])
    def test_lengths_and_slots(self, name, guidance):
        """One row a round is the ordinary chain; longer rounds in fewer slots finish and take fewer calls."""
        target = TARGETS[name]()
        values = some_texts(target, 5)
        null = {key: leaf[-1] for key, leaf in some_texts(target, 5, seed=4).items()}
        settings = {"schedule": schedule_for(target), "guidance_scale": guidance, "seed": 2}
        if guidance != 1.0:
            settings["null_condition"] = null
        expected = ancestral_sample(target, values, **settings).samples
        one = sample(target, values, draft_length=1, **settings).samples
        torch.testing.assert_close(one, expected, rtol=0, atol=bound_of(target, expected, 10))
        # A drafter that knows the answer: packed calls of several rows an image give what single rows give.
        known = target.conditioned(Conditions(values, settings.get("null_condition")))
        perfect = sample(target, values, drafter=PerfectDrafter(known), draft_length=4, max_slots=2, **settings)
        assert perfect.stats.acceptance > 0.9
        torch.testing.assert_close(perfect.samples, expected, rtol=0, atol=bound_of(target, expected, 10))
        result = sample(target, values, draft_length=4, max_slots=2, **settings)
        assert bool(result.samples.isfinite().all())
        assert result.stats.call_reduction > 1.0
        assert 0 < result.stats.accepted_by_step.sum() <= result.stats.tested_by_step.sum()

    @pytest.mark.parametrize("name", ["pixart", "sd3", "flux", "sana, patches and norms"])
    @pytest.mark.parametrize(
        "options",
        [{"draft_length": "auto"}, {"verification": "block", "draft_length": 4}, {"draft_length": 5}],
        ids=str,
    )
    def test_learned_drafters_are_shown_the_pooled_texts(self, name, options):
        """One with random weights: its drafts depend on the texts, and runs finish."""
        target = TARGETS[name]()
        values, config = some_texts(target, 3), DrafterConfig(width=32, time_unit=100)
        known = target.conditioned(Conditions(values))
        torch.manual_seed(0)
        drafter = FeatureDrafter(target.latent_shape, target.feature_shape, 0, config, known.pooled.shape[1]).eval()
        torch.nn.init.normal_(drafter.modulation.weight, std=0.1)
        for weight in drafter.parameters():
            weight.data += 0.05 * torch.randn_like(weight)
        x, t, y = torch.randn(2, *target.latent_shape), torch.tensor([500, 500]), torch.tensor([0, 1])
        shown = drafter.conditioned(known.pooled)
        h = torch.zeros(2, *target.feature_shape)
        with torch.no_grad():
            drafts = shown(h, x[:1].repeat(2, 1, 1, 1), x[:1].repeat(2, 1, 1, 1), t, y)
        assert float((drafts[0] - drafts[1]).abs().max()) > 1e-3
        result = sample(target, values, drafter=drafter, schedule=schedule_for(target), seed=3, **options)
        assert bool(result.samples.isfinite().all())

    @pytest.mark.parametrize("name", ["pixart", "sd3", "sana"])
    def test_modules_are_recognised(self, name):
        target = TARGETS[name]()
        values, schedule = some_texts(target, 2), schedule_for(target, 4)
        by_module = ancestral_sample(target.module, values, schedule=schedule, seed=1).samples
        assert torch.equal(by_module, ancestral_sample(target, values, schedule=schedule, seed=1).samples)

    def test_a_recognised_flux_has_the_pipelines_size(self):
        target = as_target("test", flux())
        assert isinstance(target, FluxTarget)
        assert target.latent_shape == (4, 128, 128)
        assert target.feature_shape == (64 * 64, 24)

    @pytest.mark.parametrize("name", ["pixart", "flux"])
    def test_an_image_depends_on_its_own_condition_only(self, name):
        target = TARGETS[name]()
        values, schedule = some_texts(target, 3), schedule_for(target, 6)
        whole = sample(target, values, schedule=schedule, draft_length=3, seed=5).samples
        changed = {key: leaf.clone() for key, leaf in values.items()}
        changed["prompt_embeds"][1] += 1.0
        other = sample(target, changed, schedule=schedule, draft_length=3, seed=5).samples
        bound = bound_of(target, whole, 6)
        torch.testing.assert_close(other[[0, 2]], whole[[0, 2]], rtol=0, atol=bound)
        assert float((other[1] - whole[1]).abs().max()) > 10 * bound

    @pytest.mark.parametrize("name", ["pixart", "flux"])
    def test_masked_tokens_and_null_conditions_of_the_target(self, name):
        target = TARGETS[name]()
        values, schedule = some_texts(target, 3), schedule_for(target, 5)
        null = {key: leaf[0] for key, leaf in some_texts(target, 1, seed=8).items()}
        own = type(target)(target.module, latent_shape=target.latent_shape, null_condition=null)
        settings = {"schedule": schedule, "guidance_scale": 3.0, "seed": 5}
        given = ancestral_sample(target, values, null_condition=null, **settings).samples
        assert torch.equal(ancestral_sample(own, values, **settings).samples, given)
        with pytest.raises(ValueError, match="guidance_scale must be 1 for a target"):
            ancestral_sample(target, values, **settings)
        if name == "pixart":
            rubbish = {**values, "prompt_embeds": values["prompt_embeds"].clone()}
            rubbish["prompt_embeds"][:-1][values["prompt_attention_mask"][:-1] == 0] += 1.0
            images = [ancestral_sample(target, one, schedule=schedule, seed=1).samples for one in (values, rubbish)]
            plain, other = (one[:-1] for one in images)
            torch.testing.assert_close(other, plain, rtol=0, atol=bound_of(target, plain, 5))

    def test_automatic_guidance_of_a_distilled_module_is_the_conditions(self):
        told, asked = TARGETS["flux, told its guidance"](), TARGETS["flux, guidance of each image"]()
        values, schedule = some_texts(asked, 2), FlowSDESchedule(4)
        values["guidance"][:] = 3.5
        plain = {key: leaf for key, leaf in values.items() if key != "guidance"}
        torch.testing.assert_close(
            ancestral_sample(asked, values, schedule=schedule).samples,
            ancestral_sample(told, plain, schedule=schedule).samples,
        )


class TestStored:
    @pytest.mark.parametrize("name", TARGETS)
    def test_what_is_stored_takes_no_more_bytes_than_the_texts(self, name):
        target = TARGETS[name]()
        values, network = bound(target)
        raw = values["prompt_embeds"]
        assert network.texts.embeds.nbytes <= raw.nbytes
        assert network.texts.is_projected == ("raw" not in name)

    def test_pooled_vectors(self):
        """Masked means of projected captions; the pipeline's pooled texts."""
        target = TARGETS["pixart"]()
        values, network = bound(target)
        projected, mask = target.module.caption_projection(values["prompt_embeds"]), values["prompt_attention_mask"]
        assert not mask[-1].any(), "nothing is kept: all count"
        mask = torch.where(mask.any(1, keepdim=True), mask, 1).unsqueeze(2)
        torch.testing.assert_close(network.pooled, (projected * mask).sum(1) / mask.sum(1))
        for name in ("sd3", "flux"):
            values, network = bound(TARGETS[name]())
            assert torch.equal(network.pooled, values["pooled_prompt_embeds"])


class TestRefused:
    @pytest.mark.parametrize(
        ("name", "change", "error", "message"),
        [
            (
                "pixart",
                {"prompt_embeds": None},
                ValueError,
                "conditions must be a dict with 'prompt_embeds' and perhaps",
            ),
            ("pixart", {"prompt": torch.zeros(2, 3)}, ValueError, "conditions must be a dict with .* got one with"),
            (
                "pixart",
                {"prompt_embeds": torch.zeros(2, TOKENS, 5)},
                ValueError,
                r"conditions\['prompt_embeds'\] must be \[N, T, 32\], got float32 \[2, 7, 5\]",
            ),
            (
                "pixart",
                {"prompt_attention_mask": torch.ones(2, 3)},
                ValueError,
                r"conditions\['prompt_attention_mask'\] must be \[N, 7\], got float32 \[2, 3\]",
            ),
            (
                "sana",
                {"prompt_attention_mask": torch.full((2, TOKENS), 0.5)},
                ValueError,
                "must be .* of ones .kept. and zeros",
            ),
            ("sd3", {"pooled_prompt_embeds": None}, ValueError, "'prompt_embeds' and 'pooled_prompt_embeds', got"),
            ("flux", {"prompt_embeds": torch.zeros(2, 7, 32, dtype=torch.long)}, ValueError, "must be floating-point"),
            ("flux, guidance of each image", {"guidance": None}, ValueError, "and 'guidance', got one with"),
            ("pixart, no variance, sizes", {"resolution": None}, ValueError, "'resolution' and 'aspect_ratio'"),
        ],
    )
    def test_conditions_of_another_form(self, name, change, error, message):
        target = TARGETS[name]()
        values = {key: leaf for key, leaf in (some_texts(target, 2) | change).items() if leaf is not None}
        with pytest.raises(error, match=f"^{type(target).__name__}: .*{message}"):
            sample(target, values, schedule=schedule_for(target, 6))

    def test_no_dict_and_no_conditions(self):
        target = TARGETS["pixart"]()
        with pytest.raises(TypeError, match="^PixArtTarget: conditions must be a dict with 'prompt_embeds'"):
            sample(target, torch.zeros(2, 3))
        with pytest.raises(ValueError, match=r"^sample: class_labels must be None for PixArtTarget"):
            sample(target, class_labels=torch.tensor([1]))
        with pytest.raises(ValueError, match="^PixArtTarget: conditions must be given"):
            target.features(torch.zeros(1, 4, 8, 8), torch.tensor([3]), torch.tensor([0]))
        with pytest.raises(ValueError, match="schedule must be one for a diffusion model"):
            sample(target, some_texts(target, 1), schedule=FlowSDESchedule(6))

    @pytest.mark.parametrize(
        ("kind", "module", "settings", "message"),
        [
            (
                PixArtTarget,
                pixart,
                {"latent_shape": (3, 8, 8)},
                r"latent_shape must be \(4, H, W\) with multiples",
            ),
            (
                PixArtTarget,
                pixart,
                {"latent_shape": (4, 7, 8)},
                r"latent_shape must be \(4, H, W\) with multiples",
            ),
            (PixArtTarget, pixart, {"latent_shape": 8}, r"latent_shape must be \(4, H, W\), got 8"),
            (SD3Target, sd3, {"latent_shape": (4, 32, 8)}, "latent_shape must be at most 24 elements high and wide"),
            (FluxTarget, flux, {"latent_shape": (4, 8, 7)}, r"latent_shape must be \(4, H, W\) with multiples"),
            (FluxTarget, flux, {"guidance": 2.0}, "guidance must be None for a module without guidance_embeds"),
            (FluxTarget, flux, {"guidance": -1.0}, "guidance must be a finite number"),
            (SanaTarget, lambda: sana(guidance_embeds=True), {}, "module must be one without guidance_embeds"),
            (SanaTarget, lambda: sana().train(), {}, "module must be in evaluation mode"),
        ],
    )
    def test_wrong_arguments_are_named(self, kind, module, settings, message):
        with pytest.raises(ValueError, match=f"^{kind.__name__}: {message}"):
            kind(module(), **settings)

    def test_other_modules(self):
        with pytest.raises(TypeError, match="^SD3Target: module must be a diffusers SD3Transformer2DModel, got Pix"):
            SD3Target(pixart())
        with pytest.raises(TypeError, match="FluxTransformer2DModel, SanaTransformer2DModel, or a DiT module with"):
            sample(torch.nn.Linear(2, 2), torch.tensor([0]))

    def test_captures_are_refused(self, monkeypatch):
        """A call within the capture of a graph, as far as a machine without a GPU can tell."""
        _, target = bound(TARGETS["pixart"]())

        class OnGPU:
            is_cuda = True

        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(ValueError, match="^PixArtTarget: cuda_graphs must be False for PixArtTarget, whose rows"):
            target._grouped(OnGPU())

    @pytest.mark.parametrize("name", ["pixart", "sana", "sd3", "flux"])
    def test_cuda_graphs_are_refused_before_a_run(self, name):
        target = TARGETS[name]()
        if name in ("sd3", "flux"):
            check_capturable("sample", True, target)
            return
        with pytest.raises(ValueError, match=f"^sample: cuda_graphs must be False for {type(target).__name__}, whose"):
            check_capturable("sample", True, target)
        check_capturable("sample", False, target)
        # With a text for every row there is nothing for the host to read.
        target._path = "blocks"
        check_capturable("sample", True, target)

    def test_public_names(self):
        for name in ("PixArtTarget", "SD3Target", "FluxTarget", "SanaTarget"):
            assert name in free_kernels.__all__
