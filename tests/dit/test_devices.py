"""One resolver of devices; every command takes --device, and what is no device is one line."""

from __future__ import annotations

import inspect

import pytest
import torch

from free_dit import cli
from free_dit.devices import resolve_device
from free_dit.training.distributed import Place


def gpus(monkeypatch, count: int) -> None:
    """A machine of so many GPUs, as far as their number goes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("count", "name", "rank", "expected"),
    [
        (0, "auto", 0, "cpu"),
        (1, "auto", 0, "cuda:0"),
        (2, "auto", 1, "cuda:1"),
        (2, "auto", 3, "cuda:1"),
        (2, "cuda", 1, "cuda:1"),
        (2, "cuda:0", 1, "cuda:0"),
        (2, "cpu", 1, "cpu"),
    ],
)
def test_names(monkeypatch, count, name, rank, expected):
    gpus(monkeypatch, count)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert str(resolve_device("test", name)) == expected


@pytest.mark.parametrize(
    ("count", "name", "message"),
    [
        (0, "abacus", "^test: device must be 'auto' or a torch device, got 'abacus'$"),
        (0, "cuda", "^test: device must be one of 0 GPUs, got cuda:0$"),
        (2, "cuda:2", "^test: device must be one of 2 GPUs, got cuda:2$"),
        (0, "meta", "^test: device must be one that this torch computes on, got 'meta': [^\n]*$"),
        (0, "xpu", "^test: device must be one that this torch computes on, got 'xpu': [^\n]*$"),
    ],
)
def test_what_is_no_device_here_is_one_line(monkeypatch, count, name, message):
    gpus(monkeypatch, count)
    with pytest.raises(ValueError, match=message):
        resolve_device("test", name)


def test_training_does_not_share_gpus(monkeypatch):
    gpus(monkeypatch, 2)
    assert str(Place(1, 2, 1).device()) == "cuda:1"
    with pytest.raises(ValueError, match="^train_drafter: device must be one of 2 GPUs, got cuda:2"):
        Place(2, 3, 2).device()


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.__name__)
def test_every_command_takes_a_device(tmp_path, command):
    parameters = inspect.signature(command).parameters
    assert parameters["device"].default == "auto"
    out = {"sample": "x.npz"}.get(command.__name__, "x")
    given = {"out": tmp_path / out} if "out" in parameters else {}
    if command.__name__ == "evaluate":
        given["generate_"] = 1
    with pytest.raises(ValueError, match="device must be 'auto'.*got 'abacus'"):
        command(**given, device="abacus")
