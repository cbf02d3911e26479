"""Instructions are counted as a warp issues them, and a prediction lies between its bounds."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton's compiler")
# The counting needs Triton's kernels, which this process may have for the interpreter.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
COUNT = """
import json, sys
from benchmarks.gpu.predict_coupling import issued
for code in json.load(sys.stdin):
    try:
        print(issued(code))
    except ValueError as error:
        print(error)
"""
PREDICT = """
import torch
from benchmarks.gpu.predict_coupling import GPUS, predict
for philox in (False, True):
    print(*predict(GPUS[1], torch.bfloat16, philox))
"""
STRAIGHT = """
kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 EXIT ;
        /*0020*/                   FADD R2, R1, R1 ;
        /*0030*/                   EXIT ;
.L_x_9:
        /*0040*/                   BRA `(.L_x_9);
"""
# A quotient, whose slow path is a call, and a block under a condition.
BRANCHES = """
        /*0000*/                   MUFU.RCP R3, R2 ;
        /*0010*/               @P0 BRA `(.L_x_1) ;
        /*0020*/                   MOV R9, 0x50 ;
        /*0030*/                   CALL.REL.NOINC `($slowpath) ;
.L_x_1:
        /*0040*/              @!P1 BRA `(.L_x_2) ;
        /*0050*/                   FADD R2, R1, R1 ;
        /*0060*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0070*/                   FMUL R2, R1, R1 ;
.L_x_3:
        /*0080*/                   EXIT ;
"""
LOOP = """
.L_x_1:
        /*0000*/                   FADD R2, R1, R1 ;
        /*0010*/               @P0 BRA `(.L_x_1) ;
        /*0020*/                   EXIT ;
"""
ENDLESS = """
        /*0000*/                   FADD R2, R1, R1 ;
"""


def run(script: str, given: str = "") -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", script], input=given, capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def test_instructions_are_those_that_a_warp_issues():
    straight, branches, loop, endless = run(COUNT, json.dumps([STRAIGHT, BRANCHES, LOOP, ENDLESS]))
    assert straight == "4"
    # The quotient, the branch around its call, the condition, its first side with the branch over the other, the end.
    assert branches == "6"
    assert "a loop from instruction 1 back to 0" in loop
    assert "does not end" in endless


def test_a_prediction_has_instructions_of_both_kernels():
    script = PREDICT + "    found = predict(GPUS[1], torch.bfloat16, philox)\n    print(found.bounds)\n"
    read, read_bounds, made, made_bounds = run(script)
    counts = []
    for line, bounds in ((read, read_bounds), (made, made_bounds)):
        issue, memory = map(float, line.split()[-2:])
        least, most = json.loads(bounds.replace("(", "[").replace(")", "]"))
        assert least == max(issue, memory)
        assert most == issue + memory
        counts.append(json.loads(line[: line.index(")") + 1].replace("(", "[").replace(")", "]")))
    # Philox takes instructions in both kernels, and saves bytes.
    assert all(few < many for few, many in zip(*counts, strict=True))
    assert float(made.split()[-1]) < float(read.split()[-1])
