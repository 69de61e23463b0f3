"""What `make sm80` asks of the Ampere kernels' machine code. (`make sm80` itself compiles them.)"""

from __future__ import annotations

import stat

import pytest
import sm80_report
from sass.flow import Flow
from sass.instructions import Instruction
from sass.kernel import Kernel, Resources
from sass.toolkit import parse_resources

COMPLETE = {"LDSM.16.M88.4": 64, "HMMA.16816.F32.BF16": 128, "LDGSTS.E.BYPASS.128": 16, "FFMA": 9}


def kernel(**counts: int) -> Kernel:
    loop = [Instruction(0, opcode) for opcode, count in (COMPLETE | counts).items() for _ in range(count)]
    return Kernel("prefill_tiles<AmpereMma<__half, 128>, 128>", Resources(191, 0, 32, 0), body=loop, loop=loop)


def test_a_kernel_as_it_should_be():
    assert sm80_report.complaints(kernel()) == []
    assert sm80_report.row(kernel())[1:] == ["191", "0", "32", "217", "0.70", "128", "64", "16", "0", "0"]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"HMMA.16816.F32.BF16": 0}, "no HMMA.16816 (mma.m16n8k16) in the main loop."),
        ({"HMMA.16816.F32.BF16": 0, "HMMA.1688.F32": 256}, "no HMMA.16816 (mma.m16n8k16) in the main loop."),
        ({"LDSM.16.M88.4": 0, "LDS.128": 64}, "no LDSM (ldmatrix) in the main loop."),
        ({"LDGSTS.E.BYPASS.128": 0, "LDG.E.128": 16, "LDGDEPBAR": 1}, "no LDGSTS (cp.async) in the main loop."),
        ({"FFMA": 13 * 128 // 4 - 64 - 16 + 1}, "3.26 other instructions per HMMA, at most 3.25 wanted."),
        ({"STL.128": 2, "LDL": 1}, "1 LDL and 2 STL in the main loop, there must be none."),
    ],
)
def test_what_is_missing_is_one_sentence(change, said):
    assert sm80_report.complaints(kernel(**change)) == [f"prefill_tiles<AmpereMma<__half, 128>, 128>: {said}"]


def test_a_kernel_without_a_loop():
    plain = kernel()
    plain.loop = []
    assert sm80_report.complaints(plain) == ["prefill_tiles<AmpereMma<__half, 128>, 128>: there is no main loop."]


def test_the_steady_path_takes_the_tile_that_cp_async_brings():
    """The copy stands behind a branch, for the last tile has none."""
    code = [
        ("LDSM.16.M88.4", ""),
        ("BRA", "0x30"),
        ("LDGSTS.E.BYPASS.128", ""),
        ("HMMA.16816.F32", ""),
        ("BRA", "0x0"),
        ("EXIT", ""),
    ]
    predicates = {1: "@P0", 4: "@P1"}
    instructions = [
        Instruction(16 * n, opcode, operands, predicates.get(n, "")) for n, (opcode, operands) in enumerate(code)
    ]
    assert sm80_report.count(Flow.of(instructions).main_loop().steady, "LDGSTS") == 1


def test_what_ptxas_says_of_another_architecture():
    said = (
        "ptxas info    : Compiling entry function '_Z1av' for 'sm_80'\n"
        "    32 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 191 registers, 744 bytes cmem[0]\n"
    )
    assert parse_resources(said)["_Z1av"].registers == 191


def test_a_compiler_without_cuobjdump_is_one_sentence(tmp_path, capsys):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.48'\n")
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(SystemExit) as ended:
        sm80_report.main(["--nvcc", str(nvcc)])
    assert ended.value.code == 2 and capsys.readouterr().err.endswith(f": there is no cuobjdump beside {nvcc}.\n")
    with pytest.raises(SystemExit) as ended:
        sm80_report.main(["--nvcc", str(tmp_path / "gone")])
    assert ended.value.code == 2 and "which can target sm_80" in capsys.readouterr().err
