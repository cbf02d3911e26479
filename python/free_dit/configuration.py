"""Configs as TOML files plus ``key=value`` overrides, read into frozen dataclasses with named errors."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

# Configurations that are part of the package.
CONFIGS = Path(__file__).parent / "configs"
T = TypeVar("T")


def load_config(kind: type[T], path: Path | None, overrides: tuple[str, ...] = ()) -> T:
    """Read a config file (defaults alone if None) and apply overrides such as ``"loop.iterations=100"``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not TOML, an unknown key, a value of the wrong type, or an override without ``=``.
    """
    values: dict[str, Any] = {}
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"load_config: config must be an existing TOML file, got {path}")
        try:
            values = tomllib.loads(Path(path).read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"load_config: {path} must be TOML, got {error}") from error
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ValueError(f"load_config: an override must read key=value, got {override!r}")
        *sections, name = key.strip().split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ValueError(f"load_config: {section} must be a section, got {place!r}")
        try:
            place[name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            place[name] = text
    return build(kind, values, str(path or kind.__name__))


def build(kind: type[T], values: dict[str, Any], source: str, default: T | None = None) -> T:
    """A dataclass from nested plain values; ``source`` is named in errors.

    Values that are not given are those of ``default``, or else the class's own.
    """
    if not isinstance(values, dict):
        raise ValueError(f"load_config: {source} must be a table, got {values!r}")
    hints = typing.get_type_hints(kind)
    known = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    arguments = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"load_config: {source} must only have keys {sorted(known)}, got {name!r}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            factory = known[name].default_factory
            own = None if factory is dataclasses.MISSING else factory()
            own = own if default is None else getattr(default, name)
            arguments[name] = build(hint, value, f"{source}:{name}", own)  # type: ignore[arg-type]
            continue
        allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if float in allowed and type(value) is int:
            value = float(value)
        if type(value) not in allowed and not (value is None and type(None) in allowed):
            names = " or ".join(a.__name__ for a in allowed)
            raise ValueError(f"load_config: {source}: {name} must be {names}, got {value!r}")
        arguments[name] = value
    try:
        return kind(**arguments) if default is None else dataclasses.replace(default, **arguments)  # type: ignore
    except ValueError as error:
        raise ValueError(f"load_config: {source}: {error}") from error
