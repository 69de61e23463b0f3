"""Machine code is read as `make sm70` and `make sm80` need it: instructions, loops, pipes, budgets and the toolkit."""

from __future__ import annotations

import json

import pytest
from sass import accesses, kernel, pipes, toolkit
from sass.accesses import Access, AccessCost
from sass.budgets import Budget, read_budgets
from sass.flow import Flow
from sass.instructions import Instruction, parse_sass
from sass.kernel import Kernel, Resources
from sass.v100 import blocks_per_sm


def sass(*lines: str, name: str = "kernel") -> str:
    """A dump as cuobjdump prints it: an address and an encoding per instruction, 16 bytes apart."""
    encoding = "  /* 0x00000a00ff017624 */\n                      /* 0x000fc400078e00ff */\n"
    code = "".join(f"        /*{16 * n:04x}*/        {line} ; {encoding}" for n, line in enumerate(lines))
    return f'\tcode for sm_70\n\t\tFunction : {name}\n\t.headerflags\t@"EF_CUDA_SM70"\n{code}\t\t......\n'


def flow(*lines: str) -> Flow:
    return Flow.of(parse_sass(sass(*lines))["kernel"])


def opcodes(instructions: list[Instruction]) -> list[str]:
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
    assert blocks_per_sm(registers, shared, threads) == blocks, why


# -------------------------------------------------------------------------------------------------------------- parser


def test_a_dump_becomes_instructions_with_predicate_operands_and_width():
    text = sass("@!P0 LDG.E.128.SYS R4, [R2+0x10]", "EXIT") + sass("NOP", name="other")
    functions = parse_sass(text)
    assert list(functions) == ["kernel", "other"]
    load, end = functions["kernel"]
    assert (load.address, load.opcode, load.predicate, load.operands) == (0, "LDG.E.128.SYS", "@!P0", "R4, [R2+0x10]")
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
    assert toolkit.parse_resources(said) == {
        "_Z1av": Resources(registers=255, spill_bytes=32, stack_bytes=128, static_shared_bytes=4096),
        "_Z1bv": Resources(registers=10, spill_bytes=0, stack_bytes=0, static_shared_bytes=0),
    }


@pytest.mark.parametrize(
    "demangled, short",
    [
        (
            "void flexattn::cuda::(anonymous namespace)::choose_tokens<float>(flexattn::SelectTokensParams)",
            "choose_tokens<float>",
        ),
        ("flexattn::cuda::(anonymous namespace)::compact_tokens(flexattn::SelectTokensParams)", "compact_tokens"),
        (
            "void flexattn::cuda::prefill<flexattn::cuda::VoltaMma<(int)128>, (int)128>(flexattn::P)",
            "prefill<VoltaMma<128>, 128>",
        ),
    ],
)
def test_kernel_names_lose_namespaces_and_parameters(demangled, short):
    assert kernel.short_name(demangled) == short


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
    loop = found.main_loop()
    assert opcodes(loop.steady) == ["HMMA.884.F32.F32.STEP0", "BAR.SYNC", "BRA"]
    assert "STG.E.SYS" in opcodes(loop.everything)


def test_the_steady_path_skips_a_mask_and_takes_the_wide_loads():
    loop = flow(
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
    assert opcodes(loop.steady) == ["LDS.U.128", "BRA", "BRA", "LDG.E.128.SYS", "HMMA.884.F32.F32.STEP0", "BRA"]
    assert "FSEL" in opcodes(loop.everything)


def test_without_tensor_cores_the_loop_with_most_products_and_loads_is_the_main_one():
    loop = flow(
        *["FADD R1, R2, R3"] * 3,  # 0x00: the softmax, say
        "@P0 BRA 0x0",
        "LDS R2, [R1]",  # 0x40
        "FFMA R1, R2, R3, R1",
        "@P1 BRA 0x40",
        "EXIT",
    ).main_loop()
    assert opcodes(loop.steady) == ["LDS", "FFMA", "BRA"]


def test_a_part_of_the_loop_that_lies_behind_its_end_belongs_to_it():
    loop = flow(
        "@P0 BRA 0x40",  # 0x00: header
        "FFMA R1, R2, R3, R1",  # 0x10
        "@P1 BRA 0x0",
        "EXIT",
        "LDS R2, [R1]",  # 0x40
        "BRA 0x10",
    ).main_loop()
    assert opcodes(loop.steady) == ["BRA", "LDS", "BRA", "FFMA", "BRA"]


def test_of_an_if_and_its_else_the_path_takes_one():
    loop = flow(
        "@P0 BRA 0x30",  # 0x00: header
        "STS.128 [R1], R4",
        "BRA 0x40",
        "STS.128 [R1], R8",  # 0x30: else
        "@P1 BRA 0x0",  # 0x40
        "EXIT",
    ).main_loop()
    assert opcodes(loop.steady).count("STS.128") == 1 and opcodes(loop.everything).count("STS.128") == 2


def test_a_call_that_traps_does_not_lead_into_what_follows_it():
    loop = flow(
        "@P0 BRA 0x50",
        "HMMA.884 R0, R1, R2, R0",  # 0x10: the loop, which nothing enters in its middle
        "@P1 BRA 0x60",
        "@P2 BRA 0x10",
        "EXIT",
        "CALL.REL.NOINC 0x70",  # 0x50: a refusal
        "BRA 0x30",  # 0x60: a part of the loop behind its end
        "BPT.TRAP 0x1",  # 0x70
        "RET.REL.NODEC R2 0x0",
    ).main_loop()
    assert loop is not None and opcodes(loop.everything) == ["HMMA.884", "BRA", "BRA", "BRA"]


def test_a_branch_for_lanes_that_have_parted_is_not_taken():
    loop = flow(
        "HMMA.884 R0, R1, R2, R0",  # 0x00: header
        "BRA.DIV 0x50",
        "SHFL.BFLY PT, R1, R1, 0x1, 0x1f",
        "@P0 BRA 0x0",  # 0x30
        "EXIT",
        "CALL.REL.NOINC 0x70",  # 0x50: the shuffle, for some lanes after the others
        "BRA 0x30",
        "RET.REL.NODEC R2 0x0",
    ).main_loop()
    assert loop is not None and opcodes(loop.steady) == ["HMMA.884", "BRA.DIV", "SHFL.BFLY", "BRA"]


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
    return [Instruction(0, written.get(name, name)) for name, count in counts.items() for _ in range(count)]


def cycles(instructions, warps, over_ideal=None):
    return {p.name: p.cycles for p in pipes.pipes_of(instructions, warps, over_ideal)}


def test_a_64_x_64_x_128_tile_takes_2048_tensor_cycles():
    """Two products of 64 * 64 * 128 FMA; in each, 4 warps with 128 m8n8k4 of 1024 FMA and 4 steps."""
    steps = 2 * (64 * 64 * 128 // 1024 // 4) * 4
    assert cycles(body(HMMA=steps), warps=4)["tensor"] == 2 * 64 * 64 * 128 / 512 == 2048


def test_every_pipe_counts_by_its_width():
    found = cycles(body(LDS128=2, STS64=3, SHFL=5, LDG=7, LDL=1, MUFU=2, FFMA=3, IADD=4, DFMA=1, BRA=1), warps=8)
    assert found == {
        "tensor": 0, "LSU": 8 * (8 + 6 + 5 + 7 + 1), "LDS": 64, "STS": 48, "SHFL": 40, "LDG": 56, "STG": 0, "local": 8,
        "MUFU": 2 * 8 * 2, "FMA": 2 * 2 * 3, "ALU": 2 * 2 * 4, "FP64": 2 * 4, "issue": 2 * 29,
    }  # fmt: skip


def test_measured_wavefronts_scale_the_ideal():
    found = cycles(body(LDS128=10, STS64=10), warps=4, over_ideal={"LDS": 2.0})
    assert (found["LDS"], found["STS"]) == (4 * 10 * 8, 4 * 10 * 2)


def test_parts_of_the_lsu_do_not_bound_and_a_switched_off_shuffle_only_issues():
    assert pipes.bounding(pipes.pipes_of(body(LDS128=10, SHFL=1), warps=4)).name == "LSU"
    assert Instruction(0, "SHFL.IDX", "PT, RZ, RZ, RZ, RZ", "@!PT").kind == "other"


# ------------------------------------------------------------------------------------------------------------- budgets

ENTRY = {"kernel": "tiles<*", "threads": 128, "dynamic_shared_bytes": 0}
RESOURCES = dict(registers=64, spill_bytes=0, stack_bytes=0, static_shared_bytes=0)


def tiles(instructions: list[Instruction], limits=None, measured=None, **resources) -> Kernel:
    """A kernel that consists of a loop over `instructions`."""
    return Kernel(
        "tiles<128>",
        Resources(**RESOURCES | resources),
        body=instructions,
        loop=instructions,
        budget=Budget(**ENTRY | (limits or {})),
        accesses=measured or {},
    )


@pytest.mark.parametrize(
    "limits, resources, said",
    [
        ({"registers": 63}, {}, "registers 64, the budget is 63"),
        ({"beside_hmma": 2}, {}, "instructions beside HMMA in the main loop 3, the budget is 2"),
        ({"spill_bytes": 32}, {"spill_bytes": 36}, "bytes of spills 36, the budget is 32"),
        ({"shared_bytes": 1024}, {"static_shared_bytes": 1025}, "bytes of shared memory 1025, the budget is 1024"),
        ({"blocks_per_sm": 9}, {}, "blocks per SM 8, the budget asks for 9"),
        ({"tensor_fraction": 0.7}, {}, "fraction of the tensor peak 0.5, the budget asks for 0.7"),
        ({"ffma_fraction": 0.8}, {}, "fraction of FFMA in the main loop 0, the budget asks for 0.8"),
        ({"no_local_in_loop": True}, {}, "1 LDL and 0 STL in the main loop"),
        ({"wavefronts_over_ideal": 1.05}, {}, "LDS wavefronts over the ideal 4.125, the budget is 1.05"),
    ],
)
def test_an_exceeded_limit_is_one_sentence(limits, resources, said):
    loop = body(HMMA=34, LDS128=2, LDL=1)  # 4 warps: 68 tensor cycles
    measured = {"LDS": AccessCost(average=33.0, ideal=8.0)}  # 4 * (2 * 4 * 33 / 8 + 1) = 136 LSU cycles
    sentences = kernel.exceeded(tiles(loop, limits, measured, **resources))
    assert len(sentences) == 1 and said in sentences[0], sentences


def test_nothing_is_said_within_the_budget():
    limits = {"registers": 64, "spill_bytes": 0, "blocks_per_sm": 8, "tensor_fraction": 1.0}
    limits |= {"needs_hmma": True, "no_local_in_loop": True}
    assert kernel.exceeded(tiles(body(HMMA=64, LDS128=4), limits)) == []
    assert kernel.exceeded(tiles(body(FFMA=1), {"needs_hmma": True})) == ["tiles<128>: no HMMA in the main loop."]
    assert kernel.exceeded(tiles(body(FFMA=8, LDS128=1, BRA=1), {"ffma_fraction": 0.8})) == []


def test_a_kernel_without_a_budget_and_a_budget_without_a_kernel_are_named():
    plain, own = tiles(body(FFMA=1)), Budget(**ENTRY)
    assert kernel.apply_budgets([plain], [own]) == [plain] and kernel.without_budget([plain], [own]) == []
    assert kernel.without_kernel([plain], [own, Budget("gone")]) == ["gone: the budget matches no kernel."]
    assert kernel.apply_budgets([plain], []) == []
    assert kernel.without_budget([plain], []) == ["tiles<128>: no pattern in the budgets matches it."]


def test_a_skipped_kernel_is_left_out_without_a_complaint():
    plain, skip = tiles(body(FFMA=1)), Budget("tiles<*", skip="empty on sm_70")
    assert kernel.apply_budgets([plain], [skip]) == []
    assert kernel.without_budget([plain], [skip]) == kernel.without_kernel([plain], [skip]) == []


@pytest.mark.parametrize(
    "entry, said",
    [({"register": 63}, "there is no limit called register."), ({"threads": None}, "threads are missing.")],
)
def test_a_budget_that_would_limit_nothing_is_refused(tmp_path, capsys, entry, said):
    file = tmp_path / "budgets.json"
    file.write_text(json.dumps([{name: value for name, value in (ENTRY | entry).items() if value is not None}]))
    with pytest.raises(SystemExit) as ended:
        read_budgets(file)
    assert ended.value.code == 2 and f"{file}: tiles<*: {said}" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ accesses


def access(kind: str, units: int, ideal: int, source: str = "tiles.cuh:1", instructions: int = 10) -> Access:
    return Access("tiles<128>", kind, source, 16, instructions, units, ideal)


def test_wavefronts_are_averaged_over_instructions_and_the_costliest_access_is_named(tmp_path):
    measured = [access("LDS", 40, 40), access("LDS", 160, 80, "tiles.cuh:2", 20)]
    measured += [access("STS", 40, 40), access("LDG", 50, 40, "tiles.cuh:3")]
    found = accesses.averages(measured)
    assert found == {
        "tiles<128>": {
            "LDS": AccessCost(200 / 30, 4, "tiles.cuh:2"),
            "STS": AccessCost(4, 4),
            "LDG": AccessCost(5, 4, "tiles.cuh:3"),
        }
    }
    accesses.write_averages(tmp_path / "new" / "wavefronts.json", found)
    assert accesses.read_averages(tmp_path / "new" / "wavefronts.json") == found


def test_an_access_over_the_ideal_is_named_and_global_memory_has_no_wavefronts():
    measured = accesses.averages([access("STS", 54, 40, "tiles.cuh:2"), access("LDG", 80, 40)])["tiles<128>"]
    sentences = kernel.exceeded(tiles(body(FFMA=1), {"wavefronts_over_ideal": 1.05}, measured))
    assert sentences == ["tiles<128>: STS wavefronts over the ideal (most at tiles.cuh:2) 1.35, the budget is 1.05."]
