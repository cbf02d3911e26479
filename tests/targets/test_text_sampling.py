"""Samplers on text-to-image transformers: lengths, slots, guidance, drafters, and what is stored of the texts."""

from __future__ import annotations

import pytest
import torch
from analytic import PerfectDrafter
from text_modules import TARGETS, bound, bound_of, flux, schedule_for, some_texts

from free_kernels import (
    Conditions,
    DrafterConfig,
    FeatureDrafter,
    FlowSDESchedule,
    FluxTarget,
    ancestral_sample,
    sample,
)
from free_kernels.targets import as_target

pytest.importorskip("diffusers")


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
        with pytest.raises(ValueError, match="null_condition must be given"):
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
