"""Compiles every Triton kernel for GPUs that need not be there: ``python triton_worker_aot.py [--few] [module]``.

Prints the table of registers, shared memory and spills, then one line of JSON with a list per configuration. Needs a
process in which Triton's interpreter was not asked for.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
from collections.abc import Iterator

import free_kernels.triton
from free_kernels.triton.aot import ARCHITECTURES, AotConfiguration, compile_configuration, table


def modules() -> Iterator[str]:
    """Names of the kernel modules that say how they are to be compiled."""
    for found in pkgutil.iter_modules(free_kernels.triton.__path__):
        if hasattr(importlib.import_module(f"free_kernels.triton.{found.name}"), "aot_configurations"):
            yield found.name


def configurations(name: str, few: bool) -> list[AotConfiguration]:
    """All of a module's, or four spread over its list."""
    every = importlib.import_module(f"free_kernels.triton.{name}").aot_configurations()
    return every[:: max(1, len(every) // 4)][-4:] if few else every


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module", nargs="?", help="one kernel module; all of them if left out")
    parser.add_argument("--few", action="store_true", help="a few configurations, the newest architecture only")
    options = parser.parse_args()
    names = [options.module] if options.module else list(modules())
    reports = [
        compile_configuration(configuration, architecture)
        for name in names
        for configuration in configurations(name, options.few)
        for architecture in (ARCHITECTURES[-1:] if options.few else ARCHITECTURES)
    ]
    print(table(reports))
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
