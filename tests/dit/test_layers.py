"""Imports of free_dit run one way: every part may import the parts before it, and no two modules one another."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from fresh_process import in_fresh_process

import free_dit

PACKAGE = Path(free_dit.__file__).parent
# From the lowest layer to the highest one; parts of one layer do not import one another.
LAYERS = (
    {"configuration", "data", "devices", "files", "interrupts", "markdown"},
    {"networks"},
    {"bundled", "checkpoints", "latents", "model"},
    {"", "loading"},
    {"training", "generation"},
    {"train_drafter", "evaluation"},
    {"quality", "experiments"},
    {"policy"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
HEIGHT = {part: height for height, parts in enumerate(LAYERS) for part in parts}


def modules() -> dict[str, Path]:
    """Files by module name; a package's name is that of its ``__init__``."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        pieces = ("free_dit", *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(piece for piece in pieces if piece != "__init__")] = path
    return found


def imports_of(source: str, known: set[str]) -> set[str]:
    """Modules among the known ones that a source imports anywhere, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    # `from package import module` is an import of the module.
    return {
        name for name in names if name in known and not any(other.startswith(f"{name}.") for other in names & known)
    }


def part_of(module: str) -> str:
    return module.removeprefix("free_dit").lstrip(".").partition(".")[0]


def wrong_arrows(importer: str, source: str, known: set[str]) -> list[str]:
    """Imports that do not lead to a lower layer or stay within the part."""
    part = part_of(importer)
    return [
        f"{importer} -> {one}"
        for one in sorted(imports_of(source, known))
        if part_of(one) != part and HEIGHT[part_of(one)] >= HEIGHT[part]
    ]


def test_every_part_has_a_layer():
    assert {part_of(name) for name in modules()} == set(HEIGHT)


@pytest.mark.parametrize("importer", sorted(modules()))
def test_imports_lead_to_lower_layers(importer):
    assert wrong_arrows(importer, modules()[importer].read_text(), set(modules())) == []


def test_no_two_modules_import_one_another():
    known = modules()
    # Raises CycleError, which names the circle.
    list(
        TopologicalSorter(
            {name: imports_of(path.read_text(), set(known)) for name, path in known.items()}
        ).static_order()
    )


def test_a_wrong_import_is_found():
    known = set(modules())
    late = "def f():\n    from free_dit.cli import main\n"
    assert wrong_arrows("free_dit.commands.sample", late, known) == ["free_dit.commands.sample -> free_dit.cli"]
    for source in ("import free_dit.evaluation.sets\n", "from free_dit.evaluation import sets\n"):
        assert wrong_arrows("free_dit.training.loop", source, known) == [
            "free_dit.training.loop -> free_dit.evaluation.sets"
        ]


def test_the_package_itself_needs_no_command_line():
    code = "import sys; import free_dit; print('tyro' in sys.modules or 'matplotlib' in sys.modules)"
    assert in_fresh_process(code) == "False"
