"""Logs of a training run: a CSV file, or TensorBoard where it is installed."""

from __future__ import annotations

import csv
from pathlib import Path

from free_kernels.validation import check_choice, fail

LOGS = ("csv", "tensorboard")


class CsvLog:
    """Lines in ``log.csv``; those of iterations after ``step``, which will run again, are dropped."""

    def __init__(self, folder: Path, step: int) -> None:
        self._path = folder / "log.csv"
        self._names = _trim(self._path, step)
        self._handle = self._path.open("a", newline="")

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Add a line, and columns for metrics that the file has none for."""
        row = {"step": step, **{name: f"{value:.6g}" for name, value in metrics.items()}}
        if not row.keys() <= set(self._names):
            self._widen(list(row))
        csv.DictWriter(self._handle, self._names, restval="").writerow(row)
        self._handle.flush()

    def _widen(self, names: list[str]) -> None:
        """Write the file anew with these columns, too; a run of an older version may have had fewer."""
        self._handle.close()
        rows = _rows(self._path)
        self._names += [name for name in names if name not in self._names]
        _rewrite(self._path, self._names, rows)
        self._handle = self._path.open("a", newline="")

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


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def _rewrite(path: Path, names: list[str], rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


def _trim(path: Path, step: int) -> list[str]:
    """Drop lines of later iterations; the names of the file's columns."""
    rows = _rows(path) if path.exists() else []
    # A process that was killed may have written half a line.
    kept = [row for row in rows if row["step"].isdigit() and None not in row.values() and int(row["step"]) <= step]
    names = list(rows[0]) if rows else []
    if len(kept) < len(rows):
        _rewrite(path, names, kept)
    return names
