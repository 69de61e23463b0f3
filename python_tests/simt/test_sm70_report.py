"""The V100 report reads machine code and counts as it says (`make sm70` runs it on the kernels)."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import sm70_report as report  # noqa: E402
import wavefronts  # noqa: E402


def sass(*lines: str, name: str = "kernel") -> str:
    """A dump as cuobjdump prints it: an address and an encoding per instruction, 16 bytes apart."""
    encoding = "  /* 0x00000a00ff017624 */\n                      /* 0x000fc400078e00ff */\n"
    code = "".join(f"        /*{16 * n:04x}*/        {line} ; {encoding}" for n, line in enumerate(lines))
    return f'\tcode for sm_70\n\t\tFunction : {name}\n\t.headerflags\t@"EF_CUDA_SM70"\n{code}\t\t......\n'


def flow(*lines: str):
    return report.Flow.of(report.parse_sass(sass(*lines))["kernel"])


def opcodes(instructions):
    return [i.opcode for i in instructions]


# ----------------------------------------------------------------------------------------------------------- occupancy


@pytest.mark.parametrize(
    "registers, shared, threads, blocks, why",
    [
        (255, 48 * 1024, 128, 2, "two blocks of 4 warps fill the registers and the shared memory"),
        (168, 32 * 1024, 128, 3, "registers and shared memory both allow three"),
        (169, 32 * 1024, 128, 2, "a register more rounds up to 176, 2 warps per sub-partition"),
        (128, 0, 128, 4, "4 warps per sub-partition"),
        (32, 0, 256, 8, "2048 threads"),
        (16, 0, 32, 32, "32 blocks"),
        (16, 48 * 1024 + 1, 64, 1, "shared memory"),
        (255, 0, 1024, 0, "32 warps of 255 registers fit nowhere"),
        (10, 0, 97, 16, "97 threads are four warps"),
    ],
)
def test_blocks_per_sm(registers, shared, threads, blocks, why):
    assert report.blocks_per_sm(registers, shared, threads) == blocks, why


# -------------------------------------------------------------------------------------------------------------- parser


def test_a_dump_becomes_instructions_with_predicate_operands_and_width():
    text = sass("@!P0 LDG.E.128.SYS R4, [R2+0x10]", "EXIT") + sass("NOP", name="other")
    functions = report.parse_sass(text)
    assert list(functions) == ["kernel", "other"]
    load, end = functions["kernel"]
    assert (load.address, load.opcode, load.predicate, load.operands) == (
        0,
        "LDG.E.128.SYS",
        "@!P0",
        "R4, [R2+0x10]",
    )
    assert load.words == 4 and load.target is None, "an address in a load is no jump"
    assert end.address == 16


def test_what_ptxas_says():
    said = (
        "ptxas info    : Compiling entry function '_Z1av' for 'sm_70'\n"
        "ptxas info    : Function properties for _Z1av\n"
        "    128 bytes stack frame, 24 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 255 registers, 4096 bytes smem, 472 bytes cmem[0]\n"
        "ptxas info    : Compiling entry function '_Z1bv' for 'sm_70'\n"
        "ptxas info    : Function properties for _Z1bv\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 10 registers, used 1 barriers, 380 bytes cmem[0]\n"
    )
    assert report.parse_resources(said) == {
        "_Z1av": dict(registers=255, spill_bytes=32, stack_bytes=128, static_shared_bytes=4096),
        "_Z1bv": dict(registers=10, spill_bytes=0, stack_bytes=0, static_shared_bytes=0),
    }


@pytest.mark.parametrize(
    "demangled, short",
    [
        (
            "void flexattn::cuda::(anonymous namespace)::choose_tokens<float>(flexattn::SelectTokensParams)",
            "choose_tokens<float>",
        ),
        (
            "flexattn::cuda::(anonymous namespace)::compact_tokens(flexattn::SelectTokensParams)",
            "compact_tokens",
        ),
        (
            "void flexattn::cuda::prefill<flexattn::cuda::VoltaMma<(int)128>, (int)128>(flexattn::P)",
            "prefill<VoltaMma<128>, 128>",
        ),
    ],
)
def test_kernel_names_lose_namespaces_and_parameters(demangled, short):
    assert report.short_name(demangled) == short


# --------------------------------------------------------------------------------------------------------------- loops


def test_the_main_loop_is_the_one_with_the_most_hmma_without_the_loops_inside_it():
    found = flow(
        "MOV R1, RZ",
        "LDS R2, [R1]",  # 0x10: a loop with more loads, but no HMMA
        "LDS R3, [R1]",
        "@P0 BRA 0x10",
        "HMMA.884.F32.F32.STEP0 R4, R2, R3, R4",  # 0x40: the main loop
        "STG.E.SYS [R8], R9",  # 0x50: a loop inside
        "@P1 BRA 0x50",
        "BAR.SYNC 0x0",
        "@P2 BRA 0x40",
        "EXIT",
    )
    assert len(found.loops()) == 3
    steady, everything = found.main_loop()
    assert opcodes(steady) == ["HMMA.884.F32.F32.STEP0", "BAR.SYNC", "BRA"]
    assert "STG.E.SYS" in opcodes(everything)


def test_the_steady_path_skips_a_mask_and_takes_the_wide_loads():
    steady, everything = flow(
        "LDS.U.128 R4, [R1]",  # 0x00: header
        "@P0 BRA 0x40",
        "FSEL R4, R4, R5, P1",  # mask, skipped by the branch
        "LDS.U.128 R4, [R1]",  # with what it reads
        "@P3 BRA 0x60",  # 0x40
        "LDG.E.128.SYS R8, [R2]",  # the next tile, where there is one
        "HMMA.884.F32.F32.STEP0 R4, R2, R3, R4",  # 0x60
        "@P2 BRA 0x0",
        "EXIT",
    ).main_loop()
    assert opcodes(steady) == [
        "LDS.U.128",
        "BRA",
        "BRA",
        "LDG.E.128.SYS",
        "HMMA.884.F32.F32.STEP0",
        "BRA",
    ]
    assert "FSEL" in opcodes(everything)


def test_a_part_of_the_loop_that_lies_behind_its_end_belongs_to_it():
    steady, _ = flow(
        "@P0 BRA 0x40",  # 0x00: header
        "FFMA R1, R2, R3, R1",  # 0x10
        "@P1 BRA 0x0",
        "EXIT",
        "LDS R2, [R1]",  # 0x40
        "BRA 0x10",
    ).main_loop()
    assert opcodes(steady) == ["BRA", "LDS", "BRA", "FFMA", "BRA"]


def test_of_an_if_and_its_else_the_path_takes_one():
    steady, everything = flow(
        "@P0 BRA 0x30",  # 0x00: header
        "STS.128 [R1], R4",
        "BRA 0x40",
        "STS.128 [R1], R8",  # 0x30: else
        "@P1 BRA 0x0",  # 0x40
        "EXIT",
    ).main_loop()
    assert opcodes(steady).count("STS.128") == 1 and opcodes(everything).count("STS.128") == 2


def test_code_without_a_way_back_has_no_loop():
    assert flow("@P0 BRA 0x20", "FADD R1, R1, R2", "EXIT").main_loop() is None
    assert flow("EXIT", "BRA 0x10").main_loop() is None, "the trap after the end is not reached"


# --------------------------------------------------------------------------------------------------------------- pipes


def body(**counts: int):
    written = {
        "HMMA": "HMMA.884.F32.F32.STEP0",
        "LDS128": "LDS.U.128",
        "STS64": "STS.64",
        "LDG": "LDG.E.SYS",
        "IADD": "IADD3.X",
    }
    return [report.Instruction(0, written.get(name, name)) for name, count in counts.items() for _ in range(count)]


def cycles(instructions, warps, over_ideal=None):
    return {p.name: p.cycles for p in report.pipes_of(instructions, warps, over_ideal)}


def test_a_64_x_64_x_128_tile_takes_2048_tensor_cycles():
    """2 products of 64 * 64 * 128 FMA over 512 per cycle; 4 warps with 128 m8n8k4 of 1024 FMA and 4 steps in each product."""
    steps = 2 * (64 * 64 * 128 // 1024 // 4) * 4
    assert cycles(body(HMMA=steps), warps=4)["tensor"] == 2 * 64 * 64 * 128 / 512 == 2048


def test_every_pipe_counts_by_its_width():
    found = cycles(
        body(LDS128=2, STS64=3, SHFL=5, LDG=7, LDL=1, MUFU=2, FFMA=3, IADD=4, DFMA=1, BRA=1),
        warps=8,
    )
    assert found == {
        "tensor": 0, "LSU": 8 * (8 + 6 + 5 + 7 + 1), "LDS": 64, "STS": 48, "SHFL": 40, "LDG": 56, "STG": 0, "local": 8,
        "MUFU": 2 * 8 * 2, "FMA": 2 * 2 * 3, "ALU": 2 * 2 * 4, "FP64": 2 * 4, "issue": 2 * 29,
    }  # fmt: skip


def test_measured_wavefronts_scale_the_ideal():
    found = cycles(body(LDS128=10, STS64=10), warps=4, over_ideal={"LDS": 2.0})
    assert (found["LDS"], found["STS"]) == (4 * 10 * 8, 4 * 10 * 2)


def test_parts_of_the_lsu_do_not_bound_and_a_switched_off_shuffle_only_issues():
    pipes = report.pipes_of(body(LDS128=10, SHFL=1), warps=4)
    assert report.bounding(pipes).name == "LSU"
    assert report.kind(report.Instruction(0, "SHFL.IDX", "PT, RZ, RZ, RZ, RZ", "@!PT")) == "other"


# ------------------------------------------------------------------------------------------------------------- budgets

LAUNCH = {"kernel": "tiles<*>", "threads": 128, "dynamic_shared_bytes": 0}


def kernel(instructions, budget=None, wavefronts=None, **resources):
    numbers = dict(registers=64, spill_bytes=0, stack_bytes=0, static_shared_bytes=0) | resources
    budget = LAUNCH | (budget or {})
    return report.Kernel(
        "tiles<128>",
        **numbers,
        body=instructions,
        loop=instructions,
        budget=budget,
        wavefronts=wavefronts,
    )


@pytest.mark.parametrize(
    "budget, resources, said",
    [
        ({"registers": 63}, {}, "registers 64, the budget is 63"),
        ({"spill_bytes": 32}, {"spill_bytes": 36}, "bytes of spills 36, the budget is 32"),
        (
            {"shared_bytes": 1024},
            {"static_shared_bytes": 1025},
            "bytes of shared memory 1025, the budget is 1024",
        ),
        ({"blocks_per_sm": 9}, {}, "blocks per SM 8, the budget asks for 9"),
        ({"tensor_fraction": 0.7}, {}, "fraction of the tensor peak 0.5, the budget asks for 0.7"),
        ({"no_local_in_loop": True}, {}, "1 LDL and 0 STL in the main loop"),
        (
            {"wavefronts_over_ideal": 1.05},
            {},
            "LDS wavefronts over the ideal 4.125, the budget is 1.05",
        ),
    ],
)
def test_an_exceeded_budget_is_one_sentence(budget, resources, said):
    loop = body(HMMA=34, LDS128=2, LDL=1)  # 4 warps: 68 tensor cycles
    measured = {"LDS": {"average": 33.0, "ideal": 8.0}}  # 4 * (2 * 4 * 33 / 8 + 1) = 136 LSU cycles
    sentences = kernel(loop, budget, measured, **resources).exceeded()
    assert len(sentences) == 1 and said in sentences[0], sentences


def test_nothing_is_said_within_the_budget():
    budget = {"registers": 64, "spill_bytes": 0, "blocks_per_sm": 8, "tensor_fraction": 1.0}
    budget |= {"needs_hmma": True, "no_local_in_loop": True}
    assert kernel(body(HMMA=64, LDS128=4), budget).exceeded() == []
    assert kernel(body(FFMA=1), {"needs_hmma": True}).exceeded() == ["tiles<128>: no HMMA in the main loop."]


def test_a_kernel_without_a_budget_and_a_budget_without_a_kernel_are_told():
    plain = kernel(body(FFMA=1))
    weighed, said = report.apply_budgets([plain], [LAUNCH, {"kernel": "gone"}])
    assert weighed == [plain] and said == ["gone: the budget fits no kernel."]
    weighed, said = report.apply_budgets([plain], [])
    assert weighed == [] and said == ["tiles<128>: no pattern in the budgets fits it."]
    weighed, said = report.apply_budgets([plain], [{"kernel": "tiles<*", "skip": "empty on sm_70"}])
    assert weighed == [] and said == []


# ---------------------------------------------------------------------------------------------------------- wavefronts


def access(kind, units, ideal, source="tiles.cuh:1", instructions=10):
    return wavefronts.Access("tiles<128>", kind, source, 16, instructions, units, ideal)


def test_wavefronts_are_averaged_over_instructions_and_the_costliest_access_is_named():
    accesses = [access("LDS", 40, 40), access("LDS", 160, 80, "tiles.cuh:2", 20)]
    accesses += [access("STS", 40, 40), access("LDG", 50, 40, "tiles.cuh:3")]
    assert wavefronts.averages(accesses) == {
        "tiles<128>": {
            "LDS": {"average": 200 / 30, "ideal": 4, "costliest": "tiles.cuh:2"},
            "STS": {"average": 4, "ideal": 4},
            "LDG": {"average": 5, "ideal": 4, "costliest": "tiles.cuh:3"},
        }
    }


def test_an_access_over_the_ideal_is_named_and_global_memory_has_no_wavefronts():
    measured = wavefronts.averages([access("STS", 54, 40, "tiles.cuh:2"), access("LDG", 80, 40)])["tiles<128>"]
    sentences = kernel(body(FFMA=1), {"wavefronts_over_ideal": 1.05}, measured).exceeded()
    assert sentences == ["tiles<128>: STS wavefronts over the ideal (most at tiles.cuh:2) 1.35, the budget is 1.05."]


@pytest.fixture
def ready(monkeypatch, tmp_path):
    """Arguments of a report on one kernel that is compiled already."""
    monkeypatch.setattr(report, "find_compiler", lambda nvcc: Path(nvcc))
    monkeypatch.setattr(report, "compile_kernels", lambda *_: [kernel(body(FFMA=1))])
    budgets = tmp_path / "budgets.json"
    budgets.write_text(json.dumps([LAUNCH | {"wavefronts_over_ideal": 1.05}]))
    return ["--budgets", str(budgets), "--out", str(tmp_path)]


def test_a_kernel_that_was_not_measured_is_told(ready, tmp_path, capsys):
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"tiles<128>": {"LDS": {"average": 4, "ideal": 4}}}))
    assert report.main([*ready, "--wavefronts", str(file)]) == 0
    file.write_text("{}")
    assert report.main([*ready, "--wavefronts", str(file)]) == 1
    assert capsys.readouterr().err == "tiles<128>: its wavefronts were not measured.\n"


def test_the_ideal_stands_in_only_where_it_is_asked_for(ready, tmp_path, monkeypatch, capsys):
    without_torch = tmp_path / "python"
    without_torch.write_text("#!/bin/sh\necho 'wavefronts: torch is missing' >&2\nexit 1\n")
    without_torch.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(without_torch))
    with pytest.raises(SystemExit) as ended:
        report.main(ready)
    assert ended.value.code == 2 and "wavefronts: torch is missing" in capsys.readouterr().err
    assert report.main([*ready, "--ideal-wavefronts"]) == 0
    assert "1 kernels, every one within its budget" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ compiler


def test_a_missing_or_too_new_compiler_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        report.main(["--nvcc", str(tmp_path / "nvcc")])
    assert ended.value.code == 2 and "NVCC names an nvcc up to 12.9" in capsys.readouterr().err
    newer = tmp_path / "nvcc"
    newer.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.48'\n")
    newer.chmod(0o755)
    with pytest.raises(SystemExit) as ended:
        report.main(["--nvcc", str(newer)])
    assert ended.value.code == 2 and "release 13.0: sm_70 takes an nvcc up to 12.9" in capsys.readouterr().err
