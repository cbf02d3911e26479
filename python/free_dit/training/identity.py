"""What must not change between a run and its resumption, compared with what an earlier run wrote."""

from __future__ import annotations

from typing import Any

# The kind of log may change.
_MAY_CHANGE = ("log",)


def changed_settings(stored: dict[str, Any], mine: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    """Names of the settings that differ, those of sections as ``section.name``.

    Args:
        stored: what the earlier run wrote, perhaps by an older version, which lacks settings added since.
        mine: those of this run.
        defaults: of settings; with its default a setting does what was done before it existed.
    """
    names = []
    for name in stored.keys() | mine.keys():
        before, now = stored.get(name, defaults.get(name)), mine.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            names += [f"{name}.{inner}" for inner in changed_settings(before, now, defaults.get(name, {}))]
        elif before != now and name not in _MAY_CHANGE:
            names.append(name)
    return sorted(names)
