"""Predicted times and memory: against the paper's own times, others' training, and what tiny models really hold."""

from __future__ import annotations

import pytest
import tiny_checkpoint
import torch
from refusals import refused

from flexattn_cuda import FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.analysis import flops, prediction
from flexattn_cuda.analysis.gpus import GIB, H100, PREDICTED, V100, Gpu
from flexattn_cuda.analysis.prediction import TrainingRun, Workload, predict_answers, predict_training
from flexattn_cuda.evaluation.prediction import WORKLOADS, predict_tasks, workload
from flexattn_cuda.evaluation.published import MAP_TASK, PAPER_TASKS, SECONDS, TFLOPS
from flexattn_cuda.tasks.options import RECIPES

CONFIG = tiny_checkpoint.config()
SEVEN = flops.llava_shape("7b")


@pytest.mark.parametrize("system", ["hd", "xattn", "flexattn"])
def test_the_share_of_the_peak_is_that_of_table_5(system):
    """Answers of a single letter: 283 prompts alone, in what the paper measured on a V100, within 5 %."""
    prompts = WORKLOADS["magnifierbench"].prompts * TFLOPS["magnifierbench"][system] * 1e12
    assert V100.compute_seconds(prompts) == pytest.approx(SECONDS["magnifierbench"][system], rel=0.05)


@pytest.mark.parametrize("system", ["hd", "xattn"])  # the released FlexAttention projects its tokens at every step
def test_the_share_of_the_bandwidth_is_that_of_table_5(system):
    work, weights = WORKLOADS["textvqa_val"], 6.74e9 * 2
    seconds = V100.compute_seconds(work.prompts * TFLOPS["textvqa_val"][system] * 1e12)
    seconds += V100.read_seconds(work.prompts * work.steps * weights)  # one question at a time
    assert seconds == pytest.approx(SECONDS["textvqa_val"][system], rel=0.05)


@pytest.mark.slow
def test_training_llava_takes_about_what_its_authors_say():
    """About ten hours on eight A100 of 40 GB, with ZeRO-3 and gradient checkpointing (README of LLaVA-1.5)."""
    a100, recipe = Gpu("A100", 40 * GIB, 312e12, 1555e9), RECIPES["paper"]
    run = TrainingRun(recipe.records, recipe.text_tokens, batch_size=4)
    found = predict_training(flops.as_system(SEVEN, "llava"), run, a100)
    assert found.gpus <= 8 and found.gpu_hours / 8 == pytest.approx(10, rel=0.15)


@pytest.mark.slow
def test_the_state_of_seven_billion_parameters_is_spread_over_gpus():
    run = TrainingRun(records=1, text_tokens=250, batch_size=4)
    config = flops.as_system(SEVEN, "flexattn")
    small, large = (predict_training(config, run, gpu) for gpu in (V100, H100))
    assert (small.gpus, large.gpus) == (8, 2)
    for found, gpu in ((small, V100), (large, H100)):
        assert found.memory <= 0.9 * gpu.memory and found.hours == found.gpu_hours / found.gpus
    assert predict_training(config, TrainingRun(1, 250, 4096), V100).gpus is None


def test_the_state_is_what_adamw_holds():
    model = FlexAttnLlavaForConditionalGeneration(CONFIG)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower." not in name)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    for one in trained:
        one.grad = torch.zeros_like(one)
    optimizer.step()
    held = [*model.parameters(), *(one.grad for one in trained)]
    held += [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert prediction._state_bytes(CONFIG) == sum(one.numel() * one.element_size() for one in held)


@pytest.mark.parametrize("system", ["llava", "hd", "xattn", "flexattn"])
def test_activations_are_about_what_autograd_keeps(system):
    """Within a third, in float32 in place of half: what a tensor of a layer is differs between versions."""
    config = flops.as_system(CONFIG, system)
    model, text = FlexAttnLlavaForConditionalGeneration(config).train(), 200
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower." not in name)
    inputs = flops.prompt(config, text, "cpu")
    for name, value in inputs.items():
        inputs[name] = torch.randn_like(value) if value.is_floating_point() else value
    weights = {one.untyped_storage().data_ptr() for one in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**inputs, labels=inputs["input_ids"])
    run = TrainingRun(1, text, 1, checkpointing=False)
    assert prediction._activation_bytes(config, run) * 2 == pytest.approx(sum(map(len, kept.values())), rel=1 / 3)


def test_training_counts_forward_and_backward_of_what_is_trained():
    """Matrix products by torch's own counter, on real tensors, where no part of them depends on what is selected."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = flops.as_system(CONFIG, "llava")
    model = FlexAttnLlavaForConditionalGeneration(config).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower." not in name)
    inputs = flops.prompt(config, 7, "cpu")
    inputs["pixel_values"] = torch.randn_like(inputs["pixel_values"])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    run = TrainingRun(1, 7, 1, checkpointing=False)
    assert prediction.training_flops(config, run) == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert prediction.training_flops(config, TrainingRun(1, 7, 1)) > prediction.training_flops(config, run)


def test_every_task_of_the_papers_tables_is_predicted():
    assert set(PAPER_TASKS) | {"mmbench_en_dev", "mmvet"} == set(WORKLOADS)
    configs = {name: flops.as_system(CONFIG, name) for name in ("llava", "flexattn")}
    found = predict_tasks(configs, batch_size=8)
    llava, flexattn = (one for one in found if one.task == MAP_TASK)
    assert (llava.system, flexattn.system, len(found)) == ("llava", "flexattn", 2 * len(WORKLOADS))
    assert llava.work.prompts == 2 * flexattn.work.prompts, "its maps are those of a prompt of their own"
    assert llava.work.prompts * llava.work.steps == flexattn.work.prompts * flexattn.work.steps
    assert workload(MAP_TASK, "hd") is None and workload(MAP_TASK, "random") == WORKLOADS[MAP_TASK]
    [magnifier] = [one for one in found if (one.task, one.system) == ("magnifierbench", "flexattn")]
    assert magnifier.published_seconds == 112


def test_an_image_is_encoded_once_and_a_batch_reads_the_weights_once():
    config, work = flops.as_system(CONFIG, "flexattn"), Workload(images=2, prompts=10, text_tokens=7, steps=3)

    def predict(**changes: int):
        batch_size = changes.pop("batch_size", 1)
        return predict_answers(config, Workload(**vars(work) | changes), batch_size, 16, PREDICTED)

    one, more = predict(), predict(images=12)
    gpu = PREDICTED[0]
    assert more.seconds[gpu.name] - one.seconds[gpu.name] == pytest.approx(gpu.compute_seconds(10 * one.image_flops))
    counted = flops.count(config, 7, prediction.selected_tokens(config))
    assert one.image_flops + one.prompt_flops == sum(counted.values())
    assert one.image_flops == counted["vision"] + counted["projector"]
    no_steps, batched = predict(steps=0), predict(batch_size=8)
    assert no_steps.seconds[gpu.name] < batched.seconds[gpu.name] < one.seconds[gpu.name]
    assert batched.memory > one.memory


@pytest.mark.slow
def test_the_command_marks_its_tables_as_predicted(flexattn, tmp_path):
    CONFIG.save_pretrained(tmp_path)
    code, out, _ = flexattn("predict", "--model", tmp_path, "--systems", "llava,flexattn", "--records", 2304)
    assert code == 0 and out.count("Predicted, not measured") == 2 and "on 2304 records" in out
    assert all(task in out for task in WORKLOADS) and "V100 32 GB" in out and "H100 80 GB" in out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--systems", "best"], "no system 'best'"),
        (["--shape", "70b"], "7b, 13b"),
        (["--shape", "7b", "--model", "x"], "exclude each other"),
        (["--model", "nowhere"], "no checkpoint 'nowhere'"),
        (["--records", 0], "records is 0; it must be at least 1"),
        (["--train-batch-size", 0], "train batch size is 0; it must be at least 1"),
    ],
)
def test_bad_input_of_predict_is_told_in_one_sentence(flexattn, arguments, said):
    assert said in refused(flexattn("predict", *arguments))
