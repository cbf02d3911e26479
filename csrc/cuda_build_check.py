"""Checks an installed free_kernels under a CUDA build of torch: modules, schemas, registrations; needs no GPU.

Run by the Python of that environment. The installed package is imported, not the checkout that this file is in.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from free_kernels import extension
from free_kernels.ops.random import philox_uniform

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(extension.__file__).parent
# Libraries that a module must do without: `_C` loads under any build of torch, `_C_cuda` under any CUDA runtime.
FORBIDDEN = {"_C": ("libcudart", "libtorch_cuda", "libc10_cuda"), "_C_cuda": ("libcudart",)}


def expect(condition: bool, problem: str) -> None:
    """End with ``problem`` unless ``condition`` holds."""
    if not condition:
        sys.exit(f"cuda-build: failed: {problem}")


def declared_schemas() -> dict[str, str]:
    """Every op's schema as csrc/schemas.cpp writes it, by name."""
    source = (ROOT / "csrc" / "schemas.cpp").read_text().replace("\\\n", "")
    for name, text in re.findall(r"#define (\w+)\s+(\".*)", source):
        source = source.replace(f"#define {name}", "").replace(name, text)
    declared = {}
    for definition in re.findall(r"library\.def\((.*?)\);", source, re.DOTALL):
        schema = "".join(re.findall(r'"([^"]*)"', definition))
        declared[schema.partition("(")[0]] = f"{extension.NAMESPACE}::{schema}"
    return declared


def check_modules() -> None:
    """Both modules are there, once, and need no library that another build of torch lacks."""
    for name, forbidden in FORBIDDEN.items():
        files = list(FOLDER.glob(f"{name}.*"))
        expect(len(files) == 1, f"{FOLDER} must hold one {name}, got {[file.name for file in files]}")
        dynamic = subprocess.run(["readelf", "-d", files[0]], capture_output=True, text=True, check=True).stdout
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
        print(f"{name} needs {', '.join(needed)}")
        wrong = [library for library in needed if library.startswith(forbidden)]
        expect(not wrong, f"{name} needs {', '.join(wrong)}")


def check_ops() -> None:
    """Schemas as declared; CPU and CUDA implementations where each op has one."""
    declared = declared_schemas()
    expect(set(declared) == set(extension.OPS), f"schemas.cpp declares {sorted(declared)}")
    for op, schema in declared.items():
        found = getattr(getattr(torch.ops, extension.NAMESPACE), op).default._schema
        expect(found == torch._C.parse_schema(schema), f"{op} has the schema {found}")
        keys = {"CPU": True, "CUDA": op in extension.CUDA_OPS}
        for key, wanted in keys.items():
            has = torch._C._dispatch_has_kernel_for_dispatch_key(f"{extension.NAMESPACE}::{op}", key)
            expect(has == wanted, f"{op} {'lacks its' if wanted else 'has a'} {key} implementation")
            reason = extension.why_no_kernel(op, key.lower())
            expect((reason is None) == wanted, f"{op} on {key.lower()}: {reason}")
        print(f"{op}: {', '.join(key for key, wanted in keys.items() if wanted)}")


def main() -> None:
    """Run every check."""
    expect(torch.version.cuda is not None, f"torch {torch.__version__} is not a CUDA build")
    expect(not FOLDER.is_relative_to(ROOT / "free_kernels"), f"{FOLDER} is the checkout, not an installation")
    reason = extension.why_no_extension()
    expect(reason is None, f"no compiled extension: {reason}")
    check_ops()
    config = extension.build_config()
    print(", ".join(f"{key} {value}" for key, value in config.items()))
    expect(config["cuda"] and len(config["cuda_arch_list"]) > 0, "no CUDA architecture was built")
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0").replace("+PTX", "").split(";")
    lacking = [name for name in wanted if name not in config["cuda_arch_list"]]
    expect(not lacking, f"not compiled for {', '.join(lacking)}")
    expect(config["torch"] == torch.__version__.partition("+")[0], f"built with the headers of torch {config['torch']}")
    check_modules()
    zero = torch.zeros(1, dtype=torch.int64)
    draws = [philox_uniform(7, zero, zero, 0, 9, backend=backend) for backend in ("reference", "extension")]
    expect(torch.equal(*draws), "philox_uniform on the CPU differs from the reference")
    print(f"cuda-build: both modules built, installed and registered under torch {torch.__version__}")


if __name__ == "__main__":
    main()
