"""Logs of a training run: a CSV file, or TensorBoard where it is installed."""

from __future__ import annotations

import csv
from pathlib import Path

from free_kernels.validation import check_choice, fail

LOGS = ("csv", "tensorboard")


class CsvLog:
    """Lines in ``log.csv``; those of iterations after ``step``, which will run again, are dropped."""

    def __init__(self, folder: Path, step: int) -> None:
        path = folder / "log.csv"
        _trim(path, step)
        self._handle = path.open("a", newline="")

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Add a line, and a header where the file is empty."""
        row = {"step": step, **{name: f"{value:.6g}" for name, value in metrics.items()}}
        writer = csv.DictWriter(self._handle, row.keys())
        if self._handle.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
        self._handle.flush()

    def close(self) -> None:
        """Close the file."""
        self._handle.close()


class TensorBoardLog:
    """Scalars in the folder ``tensorboard``; events after ``step`` are marked as overwritten.

    Raises:
        ValueError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            installed = "'csv', or 'tensorboard' with the package tensorboard installed"
            fail("train", "log", installed, f"'tensorboard' ({error})")
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Add a point to every curve."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


Log = CsvLog | TensorBoardLog


def open_log(kind: str, folder: Path, step: int) -> Log:
    """The log of a run that stands at ``step``.

    Raises:
        ValueError: another kind, or TensorBoard is not installed.
    """
    check_choice("train", "log", kind, LOGS)
    return CsvLog(folder, step) if kind == "csv" else TensorBoardLog(folder, step)


def _trim(path: Path, step: int) -> None:
    if not path.exists():
        return
    with path.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    # A process that was killed may have written half a line.
    kept = [row for row in rows if row["step"].isdigit() and None not in row.values() and int(row["step"]) <= step]
    if len(kept) < len(rows):
        with path.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, rows[0].keys())
            writer.writeheader()
            writer.writerows(kept)
