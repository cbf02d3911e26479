"""The borders between layers, and what importing the library needs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import free_kernels

PACKAGE = Path(free_kernels.__file__).parent
# Which of the library's own parts a part may import. Names are top-level modules or folders of free_kernels.
ALLOWED = {
    "reference": {"reference"},
    "triton": {"triton"},
    "ops": {"ops", "reference", "triton", "extension", "validation"},
    "targets": {"targets", "ops", "types", "validation", "hoisting"},
    "drafters": {"drafters", "ops", "types", "validation", "hoisting", "checkpoint"},
}


def imported_parts(path: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            names = [node.module + "." + alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            pieces = name.split(".")
            if pieces[0] == "free_kernels" and len(pieces) > 1:
                parts.add(pieces[1])
            if pieces[0] == "free_dit":
                parts.add("free_dit")
    return parts


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_imports_go_one_way(part):
    for path in (PACKAGE / part).rglob("*.py"):
        assert imported_parts(path) <= ALLOWED[part], path


def test_the_library_never_imports_free_dit():
    for path in PACKAGE.rglob("*.py"):
        assert "free_dit" not in imported_parts(path), path


def in_fresh_process(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", **environment}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_needs_no_triton_no_compiler_no_extension():
    code = (
        "import sys; sys.modules['triton'] = None; sys.modules['free_dit'] = None; sys.modules['sklearn'] = None; "
        "sys.modules['diffusers'] = None; "
        "import torch, free_kernels; "
        "r = free_kernels.ancestral_sample; print('free_kernels._C' in sys.modules)"
    )
    assert in_fresh_process(code) == "False"


def test_public_names_exist():
    for name in free_kernels.__all__:
        assert hasattr(free_kernels, name), name


def test_files_stay_readable():
    root = PACKAGE.parent
    for folder, suffixes, limit in (
        ("free_kernels", (".py",), 450),
        ("python", (".py",), 400),
        ("csrc", (".cpp", ".cu", ".h", ".cuh"), 300),
    ):
        for path in (root / folder).rglob("*"):
            if path.suffix in suffixes:
                assert len(path.read_text().splitlines()) <= limit, path
