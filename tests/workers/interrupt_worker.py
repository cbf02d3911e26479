"""Samples or trains until signals stop asking for more: ``interrupt_worker.py sampling MODE`` or ``training FOLDER``.

Says ``go`` when a signal may come and how each attempt ended; between attempts it checks that nothing was damaged.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import torch
from analytic import BiasedDrafter, GaussianTarget

from free_kernels import DDPMSchedule, ancestral_sample, sample, sample_iter

torch.set_num_threads(1)


class Stop:
    """The handler of both signals: raises KeyboardInterrupt, once for each time that it is armed.

    A second signal may come while the first is being answered, outside of all that could catch an exception.
    """

    armed = True

    def __call__(self, *_: object) -> None:
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt


stop = Stop()


def sampling(mode: str, trials: int) -> None:
    """Every trial samples more than time allows; after each, a short run must still give the same images."""
    target = GaussianTarget(learns_variance=True)
    common = {"guidance_scale": 2.0, "seed": 3}
    speculative = {"drafter": BiasedDrafter(target), **({"draft_length": "auto"} if mode == "auto" else {})}
    if mode == "block":
        speculative["verification"] = "block"

    def draw(labels: torch.Tensor, steps: int) -> torch.Tensor:
        settings = {"schedule": DDPMSchedule(steps), **common}
        if mode == "ordinary":
            return ancestral_sample(target, labels, **settings).samples
        if mode == "iterator":
            images = dict(sample_iter(target, labels, max_slots=8, **settings, **speculative))
            return torch.stack([images[index] for index in range(len(labels))])
        return sample(target, labels, **settings, **speculative).samples

    # Lengths that follow the clock leave the images' law only; another drafter state would still show.
    few = torch.arange(3)
    check = (lambda: torch.zeros(1)) if mode == "auto" else (lambda: draw(few, 12))
    want = check()
    for _ in range(trials):
        try:
            stop.armed = True
            print("go", flush=True)
            draw(torch.arange(6000) % 3, 1000)
            print("finished", flush=True)
        except KeyboardInterrupt:
            print("interrupted", time.monotonic(), flush=True)
        if not torch.equal(check(), want):
            print("damaged", flush=True)
    sys.exit(130)


def make_loop(folder: Path):
    from free_dit.training.loop import LoopConfig, TrainingLoop

    config = LoopConfig(iterations=300, warmup=5, checkpoint_every=10, log_every=20, ema_decay=0.9)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))

    def loss(step: int):
        time.sleep(0.002)
        return (module(torch.randn(4, 8)) - 1).square().mean(), {}

    return TrainingLoop(module, loss, config, folder, {"size": 8})


def training(folder: Path) -> None:
    """The same run, gone on with after every interrupt, until it ends."""
    # An optimizer imports PyTorch's compiler, and Python does not mend an import that was interrupted.
    make_loop(folder.with_name("imports"))
    while True:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, stop)
            stop.armed = True
            print("go", flush=True)
            loop = make_loop(folder)
            loop.run()
            break
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.save(loop.averaged_weights() | {"step": torch.tensor(loop.step)}, folder / "weights.pt")
    print("finished", flush=True)


if __name__ == "__main__":
    # As the command line's own users: without a loop that defers them, both signals mean the same.
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    if sys.argv[1] == "sampling":
        sampling(sys.argv[2], int(sys.argv[3]))
    else:
        training(Path(sys.argv[2]))
