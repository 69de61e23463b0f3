"""What a prompt costs: the paper's figures, the same count on real tensors, and input that cannot be used."""

from __future__ import annotations

import functools
import json
import resource

import pytest
import tiny
import tiny_checkpoint
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaConfig, LlavaForConditionalGeneration

from flexattn_cuda import FlexAttnLlavaForConditionalGeneration, ops
from flexattn_cuda.analysis import flops, plots
from flexattn_cuda.errors import InputError
from flexattn_cuda.mechanism.config import SYSTEMS
from flexattn_cuda.tasks.load import DEFAULT_MODEL

SEVEN = flops.llava_shape("7b")
CONFIG = tiny_checkpoint.config()
LAYERS, HR_LAYERS, WIDTH, KV_WIDTH, HEADS, HEAD_DIM = 5, 3, 32, 16, 4, 8  # of CONFIG


@functools.cache
def seven(system: str, text_tokens: int = 80, selected: int | None = None, tiles: int | None = None) -> flops.Cost:
    return flops.cost(flops.as_system(SEVEN, system), text_tokens, selected, tiles)


# ------------------------------------------------------------------------------------------------------------ the paper


@pytest.mark.slow
@pytest.mark.parametrize(
    "system, text_tokens, paper",
    [("hd", 80, 24.9), ("xattn", 80, 27.1), ("flexattn", 80, 17.1), ("hd", 55, 24.5), ("xattn", 55, 26.7)],
)
def test_table_5_within_one_percent(system, text_tokens, paper):
    assert flops.PAPER[text_tokens][system] == paper
    assert seven(system, text_tokens).published_tflops == pytest.approx(paper, rel=0.01)


@pytest.mark.slow
def test_two_of_nine_tiles_at_ten_percent_cost_less_than_the_published_mechanism():
    cost = seven("flexattn", 80, 518, 2)
    assert cost.here_tflops <= 11.3 < cost.published_tflops == pytest.approx(14.0, rel=0.01)
    assert cost.here["vision"] * 10 == cost.published["vision"] * 3  # two tiles and the image itself, of nine and it


@pytest.mark.slow
def test_the_tokens_that_a_budget_pays_for():
    config = flops.as_system(SEVEN, "flexattn")
    selected = flops.selected_for(config, 17.1, text_tokens=55)
    below, above = (sum(flops.count(config, 55, M, published=True).values()) for M in (selected - 1, selected + 1))
    assert below < 17.1e12 < above


@pytest.mark.slow
def test_nothing_is_allocated():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    flops.count(flops.as_system(SEVEN, "xattn"), text_tokens=81)
    weights = 6.7e9 * 4
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < weights / 100


# ------------------------------------------------------------------------------------------------------- real tensors


def counted_on_the_cpu(model, inputs: dict) -> int:
    """Of attention in matrix products, as on meta tensors: the CPU's fused attention is not in torch's count."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(**inputs)
    return counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("system", ["hd", "xattn", "center"])
def test_the_count_is_that_of_the_same_model_on_real_tensors(system):
    config = flops.as_system(CONFIG, system)
    inputs = flops.prompt(config, 7, "cpu") | {"logits_to_keep": 1}
    # "center" selects one of 3 x 3 cells in every layer: the 36 tokens of the middle tile.
    expected = counted_on_the_cpu(FlexAttnLlavaForConditionalGeneration(config), inputs)
    assert sum(flops.count(config, 7, selected=36, tiles=1).values()) == expected


def test_llava_costs_what_transformers_own_class_costs():
    values = {name: value for name, value in CONFIG.to_dict().items() if name not in ("model_type", "flexattn_config")}
    config = flops.as_system(CONFIG, "llava")
    theirs = LlavaForConditionalGeneration._from_config(LlavaConfig(**values), attn_implementation="eager")
    expected = counted_on_the_cpu(theirs, flops.prompt(config, 7, "cpu"))
    assert sum(flops.count(config, 7, published=True).values()) == expected


@pytest.mark.slow
def test_parts_are_what_their_names_say():
    N, M, h = 7 + tiny.SIDE**2, 36, tiny.SIDE * tiny.ZOOM
    cost = flops.cost(flops.as_system(CONFIG, "center"), 7, selected=M, tiles=1)
    plain = flops.cost(flops.as_system(CONFIG, "llava"), 7)
    assert tuple(cost.here) == tuple(cost.published) == flops.PARTS
    assert cost.here["HR projection"] == cost.published["HR projection"] == HR_LAYERS * 2 * 2 * M * WIDTH * KV_WIDTH
    sequence, with_hr = LAYERS * 4 * HEADS * HEAD_DIM * N * N, HR_LAYERS * 4 * HEADS * HEAD_DIM * M
    assert cost.published["attention"] == sequence + with_hr * N and cost.here["attention"] == sequence + with_hr
    assert cost.published["head"] == N * cost.here["head"] == N * 2 * WIDTH * CONFIG.text_config.vocab_size
    # Some transformers make rotary tables in a matrix product: theirs are HEAD_DIM for each of S x S positions.
    rotary = cost.here["language model"] - plain.here["language model"]
    assert cost.published["language model"] == cost.here["language model"] and rotary in (0, HEAD_DIM * tiny.SIDE**2)
    for part in ("vision", "projector"):
        assert cost.here[part] == 2 * plain.here[part] and cost.published[part] == 10 * plain.here[part]
    crossed = flops.count(flops.as_system(CONFIG, "xattn"), 7)
    assert crossed["HR projection"] == LAYERS * 2 * 2 * h * h * WIDTH * WIDTH
    assert crossed["attention"] == sequence + LAYERS * 4 * HEADS * HEAD_DIM * N * h * h


def test_the_operator_tells_torch_its_cost():
    B, H, N, Nk, d, M, R = 2, 4, 3, 10, 8, 6, 2
    q, k, v = (torch.randn(B, heads, n, d, requires_grad=True) for heads, n in ((H, N), (2, Nk), (2, Nk)))
    pool = dict(k_hr=torch.randn(B * M, 2, d), v_hr=torch.randn(B * M, 2, d))
    pool |= dict(hr_slots=torch.arange(B * M).int().view(B, M), hr_count=torch.full((B,), M).int())

    def counted(**options) -> int:
        with FlopCounterMode(display=False) as counter:
            ops.hierarchical_attention(q, k, v, **options)
        return counter.get_total_flops()

    product = 4 * B * H * d
    assert counted() == product * N * Nk
    assert counted(**pool, hr_from=torch.zeros(B).int()) == product * N * (Nk + M)
    listed = torch.tensor([[0, 1]] * B).int()
    assert counted(**pool, hr_rows=listed) == product * (N * Nk + R * M)
    with FlopCounterMode(display=False) as counter:
        ops.hierarchical_attention(q, k, v, **pool, hr_rows=listed).out.sum().backward()
    assert counter.get_total_flops() == product * (N * Nk + R * M) * 7 // 2


# ---------------------------------------------------------------------------------------------------- the command line


@pytest.mark.slow
def test_the_command_prints_the_papers_case_and_writes_json(flexattn, tmp_path):
    code, out, _ = flexattn("flops", "--json", tmp_path / "flops.json", "--systems", "llava,flexattn")
    assert code == 0 and "16.98" in out and "17.1" in out
    written = json.loads((tmp_path / "flops.json").read_text())
    assert list(written["systems"]) == ["llava", "flexattn"]
    for name, one in written["systems"].items():
        assert one["published_tflops"] == seven(name).published_tflops and one["here_tflops"] == seven(name).here_tflops
        assert sum(one["parts"].values()) == pytest.approx(one["published_tflops"])
        assert sum(one["here_parts"].values()) == pytest.approx(one["here_tflops"])


@pytest.mark.slow
def test_json_on_standard_output_stands_alone(flexattn, tmp_path):
    options = ("--model", DEFAULT_MODEL, "--systems", "llava,flexattn", "--json")
    code, out, err = flexattn("flops", *options, "-")
    assert flexattn("flops", *options, tmp_path / "flops.json")[0] == 0
    assert (code, out, err) == (0, (tmp_path / "flops.json").read_text(), "")
    assert list(json.loads(out)["systems"]) == ["llava", "flexattn"]


@pytest.mark.slow
def test_the_shipped_model_in_every_system(flexattn):
    code, out, _ = flexattn("flops", "--model", DEFAULT_MODEL, "--systems", ",".join(SYSTEMS), "--tiles", 9)
    assert code == 0 and "GFLOPs" in out and all(system in out for system in SYSTEMS)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--systems", "flexattn,best"], "no system 'best'"),
        (["--systems", "flexattn", "--selected", 5185], "has 5184"),
        (["--systems", "flexattn", "--tiles", 10], "has 9"),
        (["--systems", "flexattn", "--selected", 577, "--tiles", 1], "do not fit into 1 tiles of 576"),
        (["--systems", "flexattn", "--selected", -1], "-1 selected"),
        (["--systems", "llava,hd", "--selected", 9], "--selected applies to FlexAttention only"),
        (["--systems", "xattn", "--tiles", 0], "--tiles applies to FlexAttention only"),
        (["--text-tokens", 0], "at least 1"),
        (["--zoom", 0], "at least 1"),
        (["--shape", "70b"], "7b, 13b"),
        (["--shape", "7b", "--model", "x"], "exclude each other"),
        (["--model", "nowhere"], "no checkpoint 'nowhere'"),
        (["--json", "no/such/folder.json"], "cannot be written: there is no folder"),
    ],
)
def test_bad_input_is_told_in_one_sentence(flexattn, arguments, said):
    code, _, err = flexattn("flops", *arguments)
    assert code == 2 and said in err and err.strip().count("\n") == 0


def test_a_model_that_cannot_be_read(flexattn, tmp_path):
    (tmp_path / "config.json").write_text("{")
    code, _, err = flexattn("flops", "--model", tmp_path)
    assert code == 2 and "config.json cannot be read" in err


def test_a_preset_that_does_not_fit_the_model():
    with pytest.raises(InputError, match="has layers 0 to 0"):
        flops.as_system(tiny.flex_config(layers=1), "flexattn-paper")


# ------------------------------------------------------------------------------------------------------------- figure


@pytest.mark.slow
def test_cost_by_resolution_and_its_plot(tmp_path):
    points = flops.by_resolution(CONFIG, ("llava", "hd", "flexattn"), (1, 2), text_tokens=7, share=0.5, tile_share=0.5)
    assert {system: [side for side, _ in found] for system, found in points.items()} == {
        "llava": [48], "hd": [48, 96], "flexattn": [48, 96]
    }  # fmt: skip
    for found in (points["hd"], points["flexattn"]):
        assert found[0][1].here_tflops < found[1][1].here_tflops
    pytest.importorskip("matplotlib")
    flops.plot(points, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="must end in"):
        flops.plot(points, tmp_path / "cost.docx")


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_counted(flexattn, monkeypatch):
    monkeypatch.setattr(flops, "count", lambda *_: pytest.fail("costs were counted"))
    for option in ("--json", "--plot"):
        code, _, err = flexattn("flops", option, "no/such/folder.png")
        assert code == 2 and "no/such/folder.png cannot be written: there is no folder no/such" in err


def test_without_matplotlib_the_plot_says_what_to_install(monkeypatch, flexattn):
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    code, _, err = flexattn("flops", "--plot", "cost.png")
    assert code == 2 and "pip install matplotlib" in err
