"""Text-to-image transformers of diffusers as targets: their arithmetic, their conditions, and what is refused."""

from __future__ import annotations

import pytest
import torch
from text_modules import (
    IMAGES,
    PLACES,
    TARGETS,
    TOKENS,
    bound,
    call,
    flux,
    pixart,
    rows_of,
    sana,
    schedule_for,
    sd3,
    some_texts,
)

import free_kernels
from free_kernels import (
    Conditions,
    FlowSDESchedule,
    FluxTarget,
    PixArtTarget,
    SanaTarget,
    SD3Target,
    check_target,
    sample,
)
from free_kernels.sampling.cuda_graphs import check_capturable
from free_kernels.targets import as_target
from free_kernels.targets.check import difference, rounding_tolerance
from free_kernels.targets.text import cross

pytest.importorskip("diffusers")


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
