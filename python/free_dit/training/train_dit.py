"""Training of a DiT or SiT on one of the bundled data sets."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from free_dit.data import DATASETS
from free_dit.networks.dit import DiTConfig
from free_dit.networks.families import FAMILIES, save_model
from free_dit.training.image_losses import NoiseLoss, VelocityLoss
from free_dit.training.loop import LoopConfig, TrainingLoop, iteration_seed
from free_kernels.schedules import DDPMSchedule
from free_kernels.validation import check_choice, check_int, check_writable


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a trained DiT.

    Attributes:
        model: shape of the DiT.
        loop: length and speed of training.
        dataset: name of a bundled data set.
        batch_size: images per iteration.
        objective: "noise" (a DiT) or "velocity" (a SiT, on the linear interpolant).
        compile: train through torch.compile (faster, needs a C++ compiler on a CPU).
    """

    model: DiTConfig = field(default_factory=lambda: DiTConfig(8, 2, 1, 64, 16, 2, 10))
    loop: LoopConfig = field(default_factory=LoopConfig)
    dataset: str = "digits"
    batch_size: int = 128
    objective: str = "noise"
    compile: bool = False


def train(config: TrainConfig, out: Path, device: torch.device | str = "cpu") -> Path:
    """Train a DiT into the folder ``out`` and export its averaged weights to ``out/model.safetensors``.

    It trains on ``device``. Running it again in the same folder continues from the last checkpoint.

    Raises:
        ValueError, TypeError: the configuration is wrong, or the folder belongs to another one.
        OSError: the folder cannot be written.
        FloatingPointError: the loss or a gradient is not finite; the last good checkpoint stays.
    """
    check_choice("train", "dataset", config.dataset, tuple(DATASETS))
    check_int("train", "batch_size", config.batch_size, 1)
    check_choice("train", "objective", config.objective, tuple(FAMILIES))
    config.loop.check("train")
    target_path = check_writable("train", "out", Path(out) / "model.safetensors")
    data = DATASETS[config.dataset]("train")
    with iteration_seed(config.loop.seed, -1):
        model = FAMILIES[config.objective](config.model).train().to(device)
    loss: nn.Module = VelocityLoss()
    if config.objective == "noise":
        loss = NoiseLoss(DDPMSchedule(), data.level_width, config.model.learn_sigma)
    loss.to(device)
    images, classes = data.images.to(device), data.labels.to(device)
    network = torch.compile(model) if config.compile else model

    def step(_: int) -> tuple[Tensor, dict[str, float]]:
        # Drawn on the CPU, so that a run sees the same images in the same order on every device.
        index = torch.randint(len(images), (config.batch_size,)).to(device)
        return loss(network, images[index], classes[index])

    identity = {k: v for k, v in asdict(config).items() if k != "compile"}
    loop = TrainingLoop(model, step, config.loop, Path(out), identity, defaults=asdict(TrainConfig()))
    loop.run()
    # The bundled data sets are images.
    model.draws = "pixels"
    save_model(target_path, model, loop.averaged_weights())
    return target_path
