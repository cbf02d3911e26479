"""Command line: ``python -m free_dit COMMAND``; ``--help`` lists train, sample, compare, scale-model and the others."""

from __future__ import annotations

import sys

import tyro

from free_dit.commands.card import card
from free_dit.commands.compare import compare
from free_dit.commands.evaluate import evaluate
from free_dit.commands.feasibility import feasibility
from free_dit.commands.figures import figures
from free_dit.commands.generate import generate
from free_dit.commands.info import info
from free_dit.commands.policy import policy
from free_dit.commands.sample import sample
from free_dit.commands.scale_model import scale_model
from free_dit.commands.study import study
from free_dit.commands.sweep import sweep
from free_dit.commands.train import train
from free_dit.commands.train_drafter import train_drafter

# Matplotlib, SciPy and scikit-learn are imported within the functions that use them, for their start takes seconds.
COMMANDS = (
    generate,
    scale_model,
    evaluate,
    train,
    train_drafter,
    sample,
    compare,
    feasibility,
    figures,
    sweep,
    study,
    info,
    card,
)


def main() -> None:
    """Entry point; a user's mistake is one line on stderr and exit status 2, an interrupt is 130."""
    app = tyro.extras.SubcommandApp()
    for command in COMMANDS:
        app.command(command)
    app.command(
        policy, name="policy", help="A diffusion policy that reaches a goal: train, train-drafter, run, evaluate."
    )
    try:
        app.cli(prog="python -m free_dit", description=__doc__)
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
