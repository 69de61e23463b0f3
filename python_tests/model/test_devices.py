"""The model on a device, where there is one a GPU, against the CPU in float32; without a GPU the same tests run there.

Head size 64, so that a GPU takes its tensor-core kernels in half precision.
"""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from backend import BACKEND
from transformers import CompileConfig, DynamicCache

from flexattn_cuda import FlexAttnConfig, Trace
from flexattn_cuda.errors import PoolOverflow
from flexattn_cuda.mechanism.cache_argument import CACHE_ARGUMENT

DEVICES = ["cuda" if torch.cuda.is_available() and BACKEND == "cpu" else "cpu"]
HALF = [torch.float16, torch.bfloat16]
STEPS = 8
ALL_TOKENS = 3 * 18 * 18  # HR tokens of the three images of `tiny.mixed_batch`
FLOAT32 = 1e-3  # of logits of the order of 10: the kernels add in another order
# A share of the cells that the map does not choose: the same in every precision.
CENTER = tiny.settings(strategy="center", ratio=0.34)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device(request.param)


def make(settings: FlexAttnConfig = tiny.PRESETS["released"]):
    """Return the tiny model with heads of 64 channels, on the CPU."""
    text = tiny.text_config(heads=4, kv_heads=2, layers=5, vocabulary=tiny.VOCABULARY).to_dict()
    return tiny.flex(settings, text_config=text | {"head_dim": 64})


def on(device: torch.device, inputs: dict, dtype: torch.dtype | None = None) -> dict:
    """Return the inputs on a device, and pixels in this precision."""
    moved = {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}
    return {name: value.to(dtype) if "pixel" in name and dtype else value for name, value in moved.items()}


def copy_on(device: torch.device, model, dtype: torch.dtype = torch.float32):
    return copy.deepcopy(model).to(device, dtype)


def logits_of(model, inputs: dict, tokens: torch.Tensor) -> tuple[torch.Tensor, list]:
    """Return the logits [steps, V] of answering with these tokens, and what every step selected, by layer."""
    cache, trace, found = DynamicCache(config=model.config.text_config), Trace(), []
    for token in (None, *tokens[:-1]):
        call = inputs if token is None else {"input_ids": token.view(1, 1)}
        found.append(model(**call, **{CACHE_ARGUMENT: cache}, flexattn_trace=trace).logits[0, -1].float().cpu())
    return torch.stack(found), [{at: layer.mask.cpu() for at, layer in step.items()} for step in trace.steps]


# ------------------------------------------------------------------------------------------------------------ answers


def steps_that_agree(one: list, other: list) -> int:
    """Return how many steps, from the prompt on, select the same: a later one builds on keys of those before it."""
    same = [all(torch.equal(a[at], b[at]) for at in a) for a, b in zip(one, other)]
    return (*same, False).index(False)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("preset", tiny.PRESETS)
def test_half_precision_is_as_near_to_float32_as_without_hr(device, dtype, preset):
    """At most twice the largest error that the same model makes without HR tokens, as long as selections agree."""
    reference = make(tiny.PRESETS[preset])
    model, errors = copy_on(device, reference, dtype), {"without": [], "with": []}
    for seed in range(3):
        question = tiny.image_question(seed)
        tokens = tiny.generate(reference, STEPS, **question)[0][0]
        for name, inputs in {"without": tiny.low_resolution(question), "with": question}.items():
            expected, selected = logits_of(reference, inputs, tokens)
            found, found_selected = logits_of(model, on(device, inputs, dtype), tokens.to(device))
            steps = steps_that_agree(selected, found_selected) if name == "with" else STEPS
            errors[name] += (found - expected)[:steps].abs().flatten().tolist()
    assert errors["with"], "no question's prompt selected the same"
    assert max(errors["with"]) <= 2 * max(errors["without"])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_a_selection_made_without_the_map_is_the_same_in_every_precision(device, dtype):
    reference, question = make(CENTER), tiny.image_question()
    tokens = tiny.generate(reference, STEPS, **question)[0][0]
    model = copy_on(device, reference, dtype)
    expected, selected = logits_of(reference, question, tokens)
    found, found_selected = logits_of(model, on(device, question, dtype), tokens.to(device))
    assert all(torch.equal(a[at], b[at]) for a, b in zip(selected, found_selected) for at in a)
    plain, plain_found = (
        logits_of(m, on(m.device, tiny.low_resolution(question), m.dtype), tokens.to(m.device))[0]
        for m in (reference, model)
    )
    own = FLOAT32 if dtype == torch.float32 else (plain_found - plain).abs().max()
    assert (found - expected).abs().max() <= 2 * own


@torch.no_grad()
@pytest.mark.parametrize("preset", tiny.PRESETS)
def test_a_batch_of_prompts(device, preset):
    reference = make(tiny.PRESETS[preset])
    expected, logits = tiny.generate(reference, STEPS, **tiny.mixed_batch())
    found, found_logits = tiny.generate(copy_on(device, reference), STEPS, **on(device, tiny.mixed_batch()))
    assert torch.equal(found.cpu(), expected)
    assert (found_logits.cpu() - logits).abs().max() <= FLOAT32


@torch.no_grad()
def test_beams(device):
    reference = make()
    options = dict(num_beams=3, max_new_tokens=5, do_sample=False, output_scores=True, return_dict_in_generate=True)
    expected = reference.generate(**tiny.mixed_batch(), **options)
    found = copy_on(device, reference).generate(**on(device, tiny.mixed_batch()), **options)
    assert (found.sequences_scores.cpu() - expected.sequences_scores).abs().max() <= FLOAT32


@torch.no_grad()
def test_a_conversation(device):
    """Two turns, each with an image; the second goes on from the first one's cache."""
    reference, pixels = make(), tiny.images(2)
    first, second = tiny.prompt(4, "image", 9)[None], tiny.prompt(3, "image", 6, seed=4)[None]
    answers = []
    for model in (reference, copy_on(device, reference)):
        cache = DynamicCache(config=model.config.text_config)
        options = {CACHE_ARGUMENT: cache, "max_new_tokens": 4, "do_sample": False}
        ids, images = first.to(model.device), pixels.to(model.device)
        turn = model.generate(ids, pixel_values_hr=images[:1], **options)
        ids = torch.cat([turn, second.to(model.device)], dim=1)
        answers.append(model.generate(ids, pixel_values_hr=images[1:], **options).cpu())
    assert torch.equal(*answers)


# ----------------------------------------------------------------------------------------------------------- training


def gradients(model, inputs: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.train()(**inputs, use_cache=False).loss.backward()
    return {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}


def relative_errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {
        name: float((found[name] - expected[name]).norm() / expected[name].norm())
        for name in expected
        if expected[name].norm() > 0
    }


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_the_gradients_of_a_training_step(device, dtype):
    """In half precision, at most twice the largest relative error that the model makes without HR tokens."""
    reference, question = make(CENTER), tiny.image_question()
    labels = torch.full_like(question["input_ids"], -100)
    labels[:, -5:] = question["input_ids"][:, -5:]
    model, errors = copy_on(device, reference, dtype), {}
    for name, inputs in {"without": tiny.low_resolution(question), "with": question | {"hr_alpha": 0.4}}.items():
        inputs = inputs | {"labels": labels}
        errors[name] = relative_errors(gradients(model, on(device, inputs, dtype)), gradients(reference, inputs))
    assert any("k_proj_hd" in name for name in errors["with"])
    limit = 1e-4 if dtype == torch.float32 else 2 * max(errors["without"].values())
    assert max(errors["with"].values()) <= limit


def test_an_optimizer_step_lowers_the_loss(device):
    model = copy_on(device, make())
    inputs = on(device, tiny.image_question())
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -5:] = inputs["input_ids"][:, -5:]
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(3):
        loss = model.train()(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


# ------------------------------------------------------------------------------------- static caches, compiled decoding


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("preset", tiny.PRESETS)
def test_a_decoding_step_compiled_by_inductor(device, preset):
    """On a GPU replayed as a CUDA graph."""
    torch._dynamo.reset()
    reference = make(tiny.PRESETS[preset])
    expected, _ = tiny.generate(reference, STEPS, **tiny.mixed_batch())
    model = copy_on(device, reference)
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    step = torch.compile(model.forward, fullgraph=True, mode=mode)
    assert torch.equal(
        tiny.decode_in_fixed_pools(model, step, on(device, tiny.mixed_batch()), ALL_TOKENS, STEPS).cpu(), expected
    )


COMPILED = dict(
    cache_implementation="static", compile_config=CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
)
COMPILED["compile_config"]._compile_all_devices = True  # where it runs, transformers compiles on a GPU alone


@pytest.mark.slow
@torch.no_grad()
def test_generate_compiles_decoding_only_with_pools_of_fixed_size(device):
    torch._dynamo.reset()
    reference = make()
    expected, _ = tiny.generate(reference, STEPS, **tiny.mixed_batch())
    model, graphs = copy_on(device, reference), torch._dynamo.utils.counters["stats"]
    for options, compiled in ({}, False), ({"hr_capacity": ALL_TOKENS}, True):
        graphs.clear()
        found, _ = tiny.generate(model, STEPS, **on(device, tiny.mixed_batch()), **options, **COMPILED)
        assert torch.equal(found.cpu(), expected)
        assert bool(graphs["unique_graphs"]) == compiled, options


@torch.no_grad()
def test_a_capacity_that_is_too_small_is_refused(device):
    with pytest.raises(PoolOverflow, match="hr_capacity=10 is too small"):
        tiny.generate(
            copy_on(device, make()), STEPS, **on(device, tiny.mixed_batch()), hr_capacity=10,
            cache_implementation="static", disable_compile=True,
        )  # fmt: skip
