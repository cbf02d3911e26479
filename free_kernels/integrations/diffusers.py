"""``accelerate``: a diffusers ``DiTPipeline`` whose denoising loop is speculative."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from free_kernels.drafters import as_drafter
from free_kernels.protocols import Drafter
from free_kernels.results import Callback, RoundInfo, SampleStats
from free_kernels.sampling.api import sample
from free_kernels.sampling.guidance import GuidanceScale, at_least_one, check_scale
from free_kernels.sampling.noise import PhiloxNoise
from free_kernels.sampling.options import Options
from free_kernels.schedules import GaussianSchedule, schedule_from_diffusers
from free_kernels.targets.diffusers import DiffusersDiTTarget, DiffusersFlowTarget, is_diffusers_dit
from free_kernels.validation import check_choice, check_int, describe, fail
from free_kernels.wrappers import see_through

try:
    from diffusers import DiTPipeline, ImagePipelineOutput
except ImportError as error:
    raise ImportError(
        "free_kernels.integrations.diffusers needs diffusers: pip install free-kernels[diffusers]"
    ) from error

# Options of `sample` that a call of the pipeline determines.
_OURS = ("schedule", "drafter", "guidance_scale", "seed", "noise", "progress")
_SETTINGS = tuple(name for name in Options.names() if name not in _OURS)
# Whether the transformer predicts a velocity, and the scheduler's timesteps of training.
_Kind = tuple[bool, int]
Generators = torch.Generator | list[torch.Generator] | None


class AcceleratedDiTPipeline(DiTPipeline):
    """A ``DiTPipeline`` that samples speculatively; made by :func:`accelerate`.

    Attributes:
        stats: what the last call's sampling did; None before the first.
    """

    drafter: str | Drafter = "frozen"
    eta: float | None = None
    settings: Mapping[str, Any] = MappingProxyType({})
    stats: SampleStats | None = None
    _adapted: tuple[Any, DiffusersDiTTarget, _Kind] | None = None

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: GuidanceScale = 4.0,
        generator: Generators = None,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Images of the law of ``DiTPipeline.__call__`` with this pipeline's scheduler.

        Where it departs from its scheduler's law, the scheduler's is kept: the first latents have the scheduler's
        ``init_noise_sigma``. The learned variance is dropped, as there. States are float32, whatever the transformer's
        dtype.

        Args:
            class_labels: N class ids.
            guidance_scale: guidance where above 1, of all channels unless ``accelerate`` was told otherwise. Also a
                tensor ``[N]`` or a callable of the step, as in :func:`free_kernels.sample`.
            generator: the source of the seed; None takes torch's default generator. Of a list of N, one for each image,
                every image depends on its own only.
            num_inference_steps: K.
            output_type: ``"pil"``, ``"np"`` (``[N, H, W, 3]`` in [0, 1], as None) or ``"pt"`` (``[N, 3, H, W]``).
            return_dict: whether to return an ``ImagePipelineOutput`` instead of a tuple.

        Raises:
            ValueError, TypeError: an argument or the scheduler is not one that can be sampled; the message says why.
            FloatingPointError: a network output is not finite.
        """
        where = "AcceleratedDiTPipeline"
        check_int(where, "num_inference_steps", num_inference_steps, 1)
        schedule = _schedule(self.scheduler, num_inference_steps, self.eta)
        kind = _kind(self.scheduler, schedule)
        if self._adapted is None or self._adapted[0] is not self.transformer or self._adapted[2] != kind:
            self._adapted = self.transformer, _target(self.transformer, *kind), kind
        target = self._adapted[1]
        # Hooks may have come since: on the transformer that is sampled, whatever enabled them.
        target.recheck(where)
        check_scale(where, guidance_scale)
        if output_type is not None:
            check_choice(where, "output_type", output_type, ("pil", "np", "pt"))
        try:
            labels = torch.as_tensor(class_labels, device=self._execution_device).reshape(-1)
        except (TypeError, ValueError, RuntimeError):
            fail(where, "class_labels", "N class ids (get_label_ids has those of names)", class_labels, TypeError)
        settings = _cut(self.settings, schedule.num_steps)
        with _Progress(self, len(labels) * schedule.num_steps, settings.pop("callback", None)) as progress:
            result = sample(
                target,
                labels,
                schedule=schedule,
                drafter=self.drafter,
                guidance_scale=at_least_one(guidance_scale),
                callback=progress,
                **_randomness(where, generator, labels),
                **settings,
            )
        self.stats = result.stats
        images = self._decoded(result.samples, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _decoded(self, latents: Tensor, output_type: str | None) -> Any:
        """Images of latents ``[N, C, H, W]``."""
        pixels = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
        pixels = (pixels / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return pixels
        arrays = pixels.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(arrays) if output_type == "pil" else arrays

    def save_pretrained(self, *arguments: Any, **keywords: Any) -> None:
        """Save as the ``DiTPipeline`` that it was made of."""
        _copied(DiTPipeline, self).save_pretrained(*arguments, **keywords)


def accelerate(
    pipe: DiTPipeline, drafter: str | Drafter = "frozen", eta: float | None = None, **settings: Any
) -> AcceleratedDiTPipeline:
    """A pipeline with the call, the outputs and the law of ``pipe``, in fewer calls of its transformer.

    The two share their modules. ``DiTPipeline`` ignores the variance that a DiT has learned, so the law kept is that of
    its scheduler, with its own ``variance_type``.

    Args:
        pipe: a ``DiTPipeline`` with a scheduler of Gaussian steps (:func:`free_kernels.schedule_from_diffusers`).
        drafter: as in :func:`free_kernels.sample`.
        eta: share of noise, for ``DDIMScheduler`` and ``TCDScheduler``; None is their own, which for DDIM is 0: no
            noise to speculate on. ``DiTPipeline`` itself has no way to give it.
        settings: further arguments of :func:`free_kernels.sample`, such as ``draft_length`` (cut to the number of steps
            of a call), ``relaxation``, ``verification``, ``max_slots`` or ``guidance_channels``.

    Raises:
        TypeError: not a ``DiTPipeline``, or an unknown setting.
        ValueError: the pipeline cannot be sampled speculatively; the message says why.
    """
    where = "accelerate"
    if not isinstance(pipe, DiTPipeline):
        fail(where, "pipe", "a diffusers DiTPipeline", type(pipe).__name__, TypeError)
    for name in settings:
        if name not in _SETTINGS:
            fail(where, "settings", "among " + ", ".join(_SETTINGS), repr(name), TypeError)
    if any(hasattr(module, "_hf_hook") for module in pipe.transformer.modules()):
        # The hooks move weights when the module's own forward begins; it is never called here.
        fail(where, "pipe", "without CPU offload of its transformer", "an offloaded one")
    schedule = _schedule(pipe.scheduler, 1, eta)
    target = _target(pipe.transformer, *_kind(pipe.scheduler, schedule))
    as_drafter(where, drafter, target)
    Options(**_cut(settings, Options.schedule.num_steps)).check(where)
    fast = _copied(AcceleratedDiTPipeline, pipe)
    fast.drafter, fast.eta, fast.settings = drafter, eta, settings
    return fast


def _cut(settings: Mapping[str, Any], num_steps: int) -> dict[str, Any]:
    """Settings of :func:`free_kernels.sample` for so many steps: drafts are no longer than these."""
    length = settings.get("draft_length")
    return {**settings, "draft_length": min(length, num_steps) if isinstance(length, numbers.Integral) else length}


def _copied(kind: type, pipe: DiTPipeline) -> Any:
    """A pipeline of another class with the same modules, labels and configuration."""
    fast = kind(pipe.transformer, pipe.vae, pipe.scheduler)
    fast.labels = pipe.labels
    if pipe.config.get("id2label") is not None:
        fast.register_to_config(id2label=pipe.config["id2label"])
    fast.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return fast


class _Progress:
    """A pipeline's progress bar over committed steps, as a callback that also calls the user's."""

    def __init__(self, pipe: DiTPipeline, total: int, also: Callback | None) -> None:
        self.bar, self.also, self.steps = pipe.progress_bar(total=total), also, {}

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def __call__(self, info: RoundInfo) -> None:
        for image, step in zip(info.images, info.steps, strict=True):
            self.bar.update(step - self.steps.get(image, 0))
            self.steps[image] = step
        if self.also is not None:
            self.also(info)


def _kind(scheduler: Any, schedule: GaussianSchedule) -> _Kind:
    """Which adapter the scheduler's network takes."""
    return schedule.family == "flow", scheduler.config.num_train_timesteps


def _target(transformer: Any, is_flow: bool, num_train_timesteps: int) -> DiffusersDiTTarget:
    """The transformer's adapter."""
    module = see_through("accelerate", transformer).module
    if not is_diffusers_dit(module):
        fail("accelerate", "pipe.transformer", "a DiTTransformer2DModel", describe(type(module).__name__), TypeError)
    if is_flow:
        return DiffusersFlowTarget(transformer, num_train_timesteps=num_train_timesteps)
    return DiffusersDiTTarget(transformer)


def _schedule(scheduler: Any, num_steps: int, eta: float | None) -> GaussianSchedule:
    """The pipeline's own transitions."""
    schedule = schedule_from_diffusers(scheduler, num_steps, eta=eta)
    if schedule.variance == "learned_range":
        reason = "a fixed one: DiTPipeline drops the learned variance before it calls the scheduler"
        fail("accelerate", "pipe.scheduler's variance_type", reason, schedule.variance)
    return schedule


def _randomness(where: str, generator: Generators, labels: Tensor) -> dict[str, Any]:
    """``seed`` or ``noise`` for :func:`free_kernels.sample`; every generator moves on by one number."""
    if isinstance(generator, list) and len(generator) == 1 < len(labels):
        generator = generator[0]
    if generator is None or isinstance(generator, torch.Generator):
        return {"seed": _drawn(generator, 2**63 - 1)}
    if not isinstance(generator, list) or not all(isinstance(one, torch.Generator) for one in generator):
        fail(where, "generator", "None, a torch.Generator or a list of them", describe(generator), TypeError)
    if len(generator) != len(labels):
        fail(where, "generator", f"one, or a list of {len(labels)}, one for each label", f"a list of {len(generator)}")
    # An image's key has 32 bits: two unlike generators of n give the same image with a chance of n^2 / 2^33.
    keys = torch.tensor([_drawn(one, 2**32) for one in generator], device=labels.device)
    return {"noise": PhiloxNoise(0, image_keys=keys)}


def _drawn(generator: torch.Generator | None, below: int) -> int:
    """A number in ``[0, below)`` from a generator on its own device."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(below, (), generator=generator, device=device, dtype=torch.int64))
