"""The borders between layers, and what importing the library needs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from fresh_process import in_fresh_process

import free_kernels
from free_kernels.tracing import assume_constant_result

PACKAGE = Path(free_kernels.__file__).parent
# From the bottom up: a part, which is a module or folder of free_kernels, imports parts of lower layers only.
LAYERS = (
    {"constants", "tracing", "validation", "version"},
    {"checkpoint", "extension", "protocols", "results", "wrappers"},
    {"schedules"},
    {"ops"},
    {"conditioning", "conditions"},
    {"drafters", "targets"},
    {"steering"},
    {"sampling"},
    {"distributed", "integrations"},
)
# What one op takes of another's implementation: the random numbers that coupling draws by key.
SHARED = {
    ("coupling", "triton_launch"): {("random", "triton_philox")},
    ("coupling", "triton_kernels"): {("random", "triton_philox")},
    ("coupling", "triton_math"): {("random", "triton_philox")},
    ("drafting", "reference"): {("coupling", "reference")},
    ("drafting", "triton_clean"): {("coupling", "triton_math")},
    ("drafting", "triton_kernels"): {("coupling", "triton_math")},
    ("final_layer", "reference"): {("tables", "arguments"), ("tables", "reference")},
    ("network", "reference"): {
        ("attention", "arguments"),
        ("attention", "reference"),
        ("norms", "arguments"),
        ("norms", "reference"),
    },
}
# Modules beside the ops' folders that Triton code may import; they know no op.
TRITON_SHARED = {"aot", "triton_device", "triton_masks"}
OPS = sorted(path.name for path in (PACKAGE / "ops").iterdir() if (path / "__init__.py").exists())


def imported_modules(path: Path) -> set[tuple[str, ...]]:
    """Dotted names that a file imports of ours, in pieces; a name imported from a module is one of them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            names = [node.module + "." + alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {tuple(name.split(".")) for name in names if name.split(".")[0] in ("free_kernels", "free_dit")}
    return found


def imported_parts(path: Path) -> set[str]:
    """Parts of free_kernels that a file imports."""
    return {pieces[1] for pieces in imported_modules(path) if pieces[0] == "free_kernels" and len(pieces) > 1}


def files_of(part: str) -> list[Path]:
    module = PACKAGE / f"{part}.py"
    return [module] if module.exists() else sorted((PACKAGE / part).rglob("*.py"))


def wrong_parts(part: str, imported: set[str]) -> set[str]:
    """Imported parts that do not lie below a part."""
    height = next(number for number, layer in enumerate(LAYERS) if part in layer)
    return imported - set().union(*LAYERS[:height]) - {part}


def wrong_in_op(op: str, stem: str, imported: set[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """Imports that a module of an op's folder must not have.

    The reference and the Triton kernels know nothing but their own kind and the op's arguments, which know types only;
    other ops are taken from their packages.
    """
    kind = stem.partition("_")[0]
    wrong = set()
    for pieces in imported:
        if stem == "arguments":
            allowed = pieces[1:3] == ("ops", "fields")
        elif pieces[:2] != ("free_kernels", "ops"):
            allowed = pieces[1] == "constants" or kind not in ("reference", "triton")
        elif pieces[2] in OPS:
            module = pieces[3] if len(pieces) > 3 else ""
            known = kind not in ("reference", "triton") or module.partition("_")[0] in (kind, "arguments")
            own = pieces[2] == op and known
            public = kind not in ("reference", "triton") and module.partition("_")[0] not in ("reference", "triton")
            allowed = own or (public and pieces[2] != op) or (pieces[2], module) in SHARED.get((op, stem), ())
        else:
            allowed = kind not in ("reference", "triton") or (kind == "triton" and pieces[2] in TRITON_SHARED)
        if not allowed:
            wrong.add(pieces)
    return wrong


def test_every_part_has_a_layer():
    parts = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert parts - {"__init__"} == set().union(*LAYERS)


@pytest.mark.parametrize("part", sorted(set().union(*LAYERS)))
def test_imports_go_one_way(part):
    for path in files_of(part):
        assert not wrong_parts(part, imported_parts(path)), path


def test_imports_the_other_way_are_seen():
    assert wrong_parts("targets", {"ops", "drafters", "sampling", "targets"}) == {"drafters", "sampling"}
    assert wrong_parts("constants", {"constants", "validation"}) == {"validation"}
    assert not wrong_parts("integrations", {"sampling", "targets", "protocols"})


@pytest.mark.parametrize("op", OPS)
def test_implementations_of_an_op_do_not_import_one_another(op):
    for path in (PACKAGE / "ops" / op).glob("*.py"):
        assert not wrong_in_op(op, path.stem, imported_modules(path)), path


@pytest.mark.parametrize(
    ("stem", "module"),
    [
        ("reference", "free_kernels.extension.use_extension"),
        ("reference", "free_kernels.ops.coupling.triton_math.figures"),
        ("reference", "free_kernels.ops.coupling.api.couple"),
        ("triton_math", "free_kernels.ops.coupling.reference.couple"),
        ("triton_math", "free_kernels.ops.random.reference.uniform"),
        ("triton_math", "free_kernels.ops.triton_runtime.use_triton"),
        ("triton_launch", "free_kernels.extension.use_extension"),
        ("arguments", "free_kernels.constants.TransitionColumn"),
        ("arguments", "free_kernels.ops.coupling.reference.couple"),
        ("reference", "free_kernels.ops.random.arguments.PhiloxArguments"),
        ("api", "free_kernels.ops.random.triton_philox.normals"),
        ("api", "free_kernels.ops.packing.reference.pack_drafts"),
    ],
)
def test_implementations_that_import_one_another_are_seen(stem, module):
    pieces = tuple(module.split("."))
    assert wrong_in_op("coupling", stem, {pieces}) == {pieces}


def test_what_the_ops_share_knows_no_op():
    for path in (PACKAGE / "ops").glob("*.py"):
        taken = {
            pieces[2] for pieces in imported_modules(path) if pieces[:2] == ("free_kernels", "ops") and len(pieces) > 2
        }
        assert path.stem == "__init__" or not taken & set(OPS), path


def test_the_library_never_imports_free_dit():
    for path in PACKAGE.rglob("*.py"):
        assert "free_dit" not in {pieces[0] for pieces in imported_modules(path)}, path


def test_nothing_imports_an_integration():
    for path in PACKAGE.rglob("*.py"):
        if PACKAGE / "integrations" not in path.parents:
            assert "integrations" not in imported_parts(path), path


def test_import_needs_no_triton_no_compiler_no_extension():
    code = (
        "import sys; sys.modules['triton'] = None; sys.modules['free_dit'] = None; sys.modules['sklearn'] = None; "
        "sys.modules['diffusers'] = None; "
        "import torch, free_kernels; "
        "r = free_kernels.ancestral_sample; print('free_kernels._C' in sys.modules)"
    )
    assert in_fresh_process(code) == "False"


def test_nothing_is_imported_before_it_is_used():
    """The compiler, plots and statistics take longer to start than torch itself: nobody waits for them in vain."""
    late = "[name for name in ('torch._dynamo', 'triton', 'diffusers', 'matplotlib', 'scipy', 'sklearn') "
    late += "if name in sys.modules]"
    schedule = "free_kernels.DDPMSchedule(8)"
    code = (
        "import sys, torch, free_dit, free_kernels; target, drafter = free_dit.load_bundled('digits'); "
        f"free_kernels.sample(target, torch.arange(2), schedule={schedule}, drafter=drafter); print({late}); "
        f"import free_dit.cli; print({late})"
    )
    assert in_fresh_process(code).splitlines() == ["[]", "[]"]


def test_a_constant_result_is_pytorchs():
    def first() -> None: ...
    def second() -> None: ...

    assert vars(assume_constant_result(first)) == vars(torch.compiler.assume_constant_result(second)) != {}


def test_public_paths_are_importable():
    """Paths that the README and the pages of docs tell, besides the names of the package."""
    from free_kernels.distributed import sample, sample_mesh
    from free_kernels.drafters import DrafterConfig, FeatureDrafter, FrozenDrafter
    from free_kernels.ops import (
        Coupling,
        append_features,
        commit_drafts,
        couple,
        couple_block,
        couple_block_philox,
        couple_philox,
        feature_attention,
        gaussian_transition,
        pack_drafts,
        philox_normal,
        philox_uniform,
        rewind_features,
    )
    from free_kernels.ops.coupling import couple as couple_of_its_folder
    from free_kernels.schedules import DDIMSchedule, DDPMSchedule, FlowSDESchedule
    from free_kernels.targets import DiffusersDiTTarget, DiTTarget, HookTarget, SiTTarget

    assert couple is couple_of_its_folder
    assert sample is not free_kernels.sample
    assert FeatureDrafter is free_kernels.FeatureDrafter
    assert DDPMSchedule is free_kernels.DDPMSchedule
    functions = (sample_mesh, append_features, commit_drafts, couple_block, couple_block_philox, couple_philox)
    functions += (feature_attention, gaussian_transition, pack_drafts, philox_normal, philox_uniform, rewind_features)
    assert all(map(callable, functions))
    kinds = (Coupling, DrafterConfig, FrozenDrafter, DDIMSchedule, FlowSDESchedule)
    assert all(isinstance(kind, type) for kind in (*kinds, DiffusersDiTTarget, DiTTarget, HookTarget, SiTTarget))
