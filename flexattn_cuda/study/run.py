"""The study: every system fine-tuned from one start, asked the same questions, for several seeds.

    OUT/seed-N/start/           encoder and low-resolution stage of the seed, shared by its systems: a checkpoint
    OUT/seed-N/pictures.pt      encoded pictures to train on, and those that are asked about (questions.pt)
    OUT/seed-N/SYSTEM/          the fine-tuned model and its processor, for `flexattn ask --model`
    OUT/seed-N/SYSTEM.json      what it answered; written last, so a system without it is taken up again
    OUT/results/                tables, figures and the report (report.py); all that is worth keeping

A unit of work is a seed's start or one system of a seed. Each runs in one thread of a process of its own.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import flexattn_cuda
from flexattn_cuda import answering, checkpoints, flops
from flexattn_cuda.configuration import FlexAttnConfig, settings_of
from flexattn_cuda.modeling import FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.processing import FlexAttnLlavaProcessor, InputError
from flexattn_cuda.report import Report
from flexattn_cuda.study import pretraining
from flexattn_cuda.study.encoded_scenes import EncodedScenes, encode_scenes, resolutions_of
from flexattn_cuda.study.pretraining import EncoderData, MapOfLayer
from flexattn_cuda.study.report import write_report
from flexattn_cuda.study.scenes import CHANCE, TASKS, Painter, find_photographs, make_scenes, vocabulary
from flexattn_cuda.study.small_model import ModelSizes, build_model, build_processor
from flexattn_cuda.trace import Trace

SYSTEMS = ("llava", "flexattn", "hd", "random", "center", "xattn", "flexattn-paper", "flexattn-zoom2", "flexattn-zoom4")
MAPS_OF = ("llava", "flexattn")  # the supplement's figure 2
EXAMPLES_PER_TASK = 2


@dataclass(frozen=True)
class Preset:
    """How much is done. pictures: To train on, in the low-resolution stage and in fine-tuning; questions: Of the evaluation,
    half of them about large objects; the steps of the stages and of each system, and the batch of the latter."""

    pictures: int
    questions: int
    encoder_steps: int
    localise_steps: int
    steps: int
    batch: int
    rate: float
    sizes: ModelSizes = ModelSizes()


PRESETS = {
    "tiny": Preset(pictures=60, questions=20, encoder_steps=4, localise_steps=3, steps=4, batch=8, rate=1e-2),
    "small": Preset(pictures=2400, questions=1600, encoder_steps=2200, localise_steps=900, steps=1200, batch=48, rate=1e-2),
}


def settings_for(system: str, sizes: ModelSizes, share: float = 0.1) -> FlexAttnConfig | None:
    """A system at the study's sizes. "flexattn-zoom2" is FlexAttention at that zoom.

    The grid of LR cells is small: selections are not pooled, and the first layer with HR tokens is the model's own.

    Args:
        share: Of the LR cells that "random" and "center" choose.
    """
    name, zoom = _name_and_zoom(system)
    settings = settings_of(name, sizes.lowres, zoom)
    if settings is None or settings.system != "flexattn":
        return settings
    return dataclasses.replace(settings, first_layer=sizes.first_layer, pool=0, warmup=None, ratio=share)


def _name_and_zoom(system: str) -> tuple[str, int]:
    name, _, zoom = system.partition("-zoom")
    return name, int(zoom or 3)


# ---------------------------------------------------------------------------------------------------------- a seed's start


def make_start(folder: Path, seed: int, preset: Preset, photographs: Sequence[Path], tell: Callable[[str], None]) -> None:
    """Trains what the systems of a seed share, and encodes its pictures at every resolution."""
    train, held_out = (find_photographs(photographs, part) for part in (False, True))
    flexattn = settings_for("flexattn", preset.sizes)
    torch.manual_seed(seed)
    processor = build_processor(vocabulary(), flexattn, preset.sizes)
    model = build_model(processor, flexattn, preset.sizes)
    found: dict[str, Any] = {"seconds": {}}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        begun = time.process_time()
        tell(name)
        yield
        found["seconds"][name] = round(time.process_time() - begun, 1)

    def stored(name: str, make: Callable[[], Any]) -> Any:
        path = folder / name
        if not path.exists():
            with stage(name.partition(".")[0]):
                made = make()
                torch.save(made, path.with_suffix(".new"))
            os.replace(path.with_suffix(".new"), path)
        return torch.load(path, weights_only=False, mmap=True)

    def encoder() -> dict[str, Any]:
        accuracy = pretraining.train_encoder(model, processor, train, held_out, preset.encoder_steps, seed)
        data = EncoderData(Painter(train, None, random.Random(f"whiten {seed}")), processor.image_processor, preset.sizes.patch)
        pretraining.whiten(model, data.batch(128)[0])
        return {"weights": model.state_dict(), "accuracy": accuracy}

    kept = stored("encoder.pt", encoder)
    model.load_state_dict(kept["weights"])
    found["encoder"] = kept["accuracy"]
    resolutions = resolutions_of(settings_for(system, preset.sizes) for system in SYSTEMS)

    def encoded(photos: list, count: int, number: int) -> EncodedScenes:
        return encode_scenes(model, processor, make_scenes(photos, count, 10 * seed + number), resolutions)

    pictures = stored("pictures.pt", lambda: encoded(train, preset.pictures, 0))
    stored("questions.pt", lambda: encoded(held_out, preset.questions, 1))
    checked = encode_scenes(model, processor, make_scenes(held_out, min(250, preset.questions), 10 * seed + 2), [])
    with stage("localise"):
        torch.manual_seed(seed)
        found["localise"] = pretraining.train_localisation(model, processor, pictures, checked, preset.localise_steps, seed)
        found["selected"] = selection(model, processor, pictures)
    # Plain LLaVA: what a system has beyond it starts as its configuration says.
    unfinished = folder / "start.new"
    shutil.rmtree(unfinished, ignore_errors=True)
    model.config.flexattn_config = None
    model.save_pretrained(unfinished, state_dict={name: weight for name, weight in model.state_dict().items() if "_proj_hd." not in name})
    processor.save_pretrained(unfinished)
    (unfinished / "start.json").write_text(json.dumps(found))
    os.replace(unfinished, folder / "start")


@torch.no_grad()
def selection(model, processor, pictures: EncodedScenes) -> dict[str, float]:
    """What the map of the layer before `first_layer` selects, on average over 256 questions: share of the HR tokens, tiles."""
    trace, settings = Trace(), model.config.flexattn
    picks = pictures.sample(random.Random(0), min(256, len(pictures.scenes)))
    model(**pictures.batch(picks, processor, settings), use_cache=False, flexattn_trace=trace)
    mask = trace.steps[0][settings.first_layer - 1].mask[:, 0, 0].float()  # of the row that predicts the answer's first token
    side = model.config.hr_side // settings.zoom
    tiles = mask.view(-1, settings.zoom, side, settings.zoom, side).amax((2, 4)).sum((1, 2))
    return {"share": mask.mean().item(), "tiles": tiles.mean().item()}


# -------------------------------------------------------------------------------------------------------------- a system


class Picks(torch.utils.data.Dataset):
    """The questions of all steps, the same for every system of a seed."""

    def __init__(self, pictures: EncodedScenes, steps: int, batch: int, seed: int):
        rng = random.Random(f"fine-tune {seed}")
        self.picks = [pick for _ in range(steps) for pick in pictures.sample(rng, batch)]

    def __len__(self) -> int:
        return len(self.picks)

    def __getitem__(self, number: int):
        return self.picks[number]


def run_system(folder: Path, seed: int, system: str, preset: Preset, tell: Callable[[str], None]) -> None:
    """Fine-tunes one system and asks it all questions."""
    from flexattn_cuda.study.finetuning import fine_tune  # brings transformers' Trainer

    begun = time.process_time()
    started = json.loads((folder / "start" / "start.json").read_text())
    settings = settings_for(system, preset.sizes, started["selected"]["share"])
    torch.manual_seed(seed)
    model, processor = load(folder / "start", settings)
    pictures = torch.load(folder / "pictures.pt", weights_only=False, mmap=True)
    losses = fine_tune(
        model, Picks(pictures, preset.steps, preset.batch, seed), lambda picks: pictures.batch(picks, processor, settings),
        folder / f"{system}.checkpoints", preset.batch, preset.rate, seed, tell,
    )  # fmt: skip
    del pictures
    seconds = time.process_time() - begun
    tell("questions")
    questions = torch.load(folder / "questions.pt", weights_only=False, mmap=True)
    torch.manual_seed(seed)
    rows = answers(model, processor, questions, settings)
    maps = attention_in_boxes(model, processor, questions, settings) if system in MAPS_OF else []
    selected = selection(model, processor, questions) if model.config.system == "flexattn" else None
    model.save_pretrained(folder / system)
    processor.save_pretrained(folder / system)
    outcome = {"answers": rows, "maps": maps, "selected": selected, "losses": losses, "seconds": round(seconds, 1)}
    unfinished = folder / f"{system}.new"
    unfinished.write_text(json.dumps(outcome))
    os.replace(unfinished, folder / f"{system}.json")
    shutil.rmtree(folder / f"{system}.checkpoints", ignore_errors=True)


def load(folder: Path, settings: FlexAttnConfig | None) -> tuple[FlexAttnLlavaForConditionalGeneration, FlexAttnLlavaProcessor]:
    """A checkpoint as another system; None is plain LLaVA."""
    config = checkpoints.load_config(folder)
    config.flexattn_config = None if settings is None else settings.to_dict()
    model = FlexAttnLlavaForConditionalGeneration.from_pretrained(folder, config=config)
    return model.eval(), FlexAttnLlavaProcessor.from_pretrained(folder, config=model.config)


@torch.inference_mode()
def answers(model, processor, questions: EncodedScenes, settings: FlexAttnConfig | None, batch: int = 50) -> list[dict[str, Any]]:
    """Greedy answers by `generate`, a dict for each question: number, task, size, question, expected, answer, right."""
    rows, picks, end = [], questions.asked(), processor.tokenizer.eos_token_id
    for begin in range(0, len(picks), batch):
        some = picks[begin : begin + batch]
        inputs = questions.batch(some, processor, settings, answers=False)
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for (number, question), ids in zip(some, output.tolist()):
            words = processor.tokenizer.convert_ids_to_tokens(ids[: ids.index(end)] if end in ids else ids)
            scene = questions.scenes[number]
            rows.append({
                "number": number, "task": question.task, "size": scene.size, "question": question.text,
                "expected": " ".join(question.answer), "answer": " ".join(words), "right": int(tuple(words) == question.answer),
            })  # fmt: skip
    return rows


@torch.no_grad()
def attention_in_boxes(model, processor, questions: EncodedScenes, settings: FlexAttnConfig | None, batch: int = 50) -> list[dict[str, Any]]:
    """By layer and size of the objects: the share of the map that lies on the answer boxes (supplement, figure 2).

    The map is that of the row which predicts the answer's first token, over the picture's low-resolution tokens: mean over
    heads of the softmax over the sequence. mass: its share in the boxes; largest: how often its largest cell is in one;
    boxes: the boxes' share of the cells.
    """
    layers = range(model.config.text_config.num_hidden_layers)
    maps_of, picks = [MapOfLayer(model, layer) for layer in layers], questions.asked()
    sums: dict[tuple[int, str], list[torch.Tensor]] = {}
    for begin in range(0, len(picks), batch):
        some = picks[begin : begin + batch]
        inputs = questions.batch(some, processor, settings)
        model(**inputs, use_cache=False)
        answered = (inputs["labels"] != -100).sum(1)
        cells = questions.answer_cells(some).float()
        for layer, map_of in zip(layers, maps_of):
            maps = map_of(inputs, processor.image_token_id, int(answered.max()))
            first = maps[torch.arange(len(some)), maps.shape[1] - answered]
            first = first / first.sum(-1, keepdim=True)
            largest = cells.gather(-1, first.argmax(-1, keepdim=True))[:, 0]
            for row, values in enumerate(torch.stack([(first * cells).sum(-1), largest, cells.mean(-1)], 1)):
                sums.setdefault((layer, questions.scenes[some[row][0]].size), []).append(values)
    for map_of in maps_of:
        map_of.handle.remove()
    return [
        {"layer": layer, "size": size} | dict(zip(("mass", "largest", "boxes"), torch.stack(values).mean(0).tolist()))
        for (layer, size), values in sums.items()
    ]


# --------------------------------------------------------------------------------------------------------------- the study


def study(
    output: Path,
    photographs: Sequence[Path],
    preset: str = "small",
    seeds: Sequence[int] = (0, 1, 2),
    systems: Sequence[str] = SYSTEMS,
    jobs: int | None = None,
    command: str = "",
    progress: bool = False,
) -> Path:
    """Runs what is not done yet of all seeds and systems, then writes the report.

    Args:
        output: A folder, see above; called again with it, the study goes on.
        photographs: Folders of JPEG files; every fourth, by name, is held out for the questions.
        preset: A key of PRESETS.
        jobs: Processes at a time; by default as many as there are cores.
        command: How the study was called, for the report.
        progress: Tell on stderr how far it is.
    Returns:
        The report's path.
    Raises:
        InputError: Something cannot be used, or an earlier study in `output` had other settings.
    """
    if preset not in PRESETS:
        raise InputError(f"the preset is {preset!r}; allowed: {', '.join(PRESETS)}")
    if unknown := sorted(set(systems) - set(SYSTEMS)):
        raise InputError(f"there is no system {unknown[0]!r} in the study; allowed: {', '.join(SYSTEMS)}")
    if not seeds or not systems:
        raise InputError("a study needs a seed and a system at least")
    if jobs is not None and jobs < 1:
        raise InputError(f"the number of jobs is {jobs}; it must be at least 1")
    find_photographs(photographs, True)  # before anything is begun
    _same_settings(output, {"preset": {"name": preset, **asdict(PRESETS[preset])}, "photographs": [Path(one).name for one in photographs]})
    _run(output, list(photographs), preset, list(dict.fromkeys(seeds)), list(dict.fromkeys(systems)), jobs, progress)
    results = collect(output, photographs, preset, command)
    return write_report(results)


def _same_settings(output: Path, settings: dict[str, Any]) -> None:
    written = output / "study.json"
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not written.exists():
            written.write_text(json.dumps(settings))
        before = json.loads(written.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{output} cannot be used for a study: {error}") from None
    if before != json.loads(json.dumps(settings)):
        raise InputError(f"the study in {output} was begun with another preset or other photographs; choose another folder")


def _run(output: Path, photographs: list[Path], preset: str, seeds: list[int], systems: list[str], jobs: int | None, progress: bool) -> None:
    """The units that are not done, starts first, several at a time. What one says is told; one that fails ends the study."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, Report(len(seeds) * (1 + len(systems)), "units", progress) as report:
        said = manager.Queue()
        with ProcessPoolExecutor(jobs or len(os.sched_getaffinity(0)), context, initializer=_one_thread) as pool:
            running: dict[Future, tuple[int, str]] = {}

            def submit(seed: int, unit: str) -> None:
                running[pool.submit(_unit, output / f"seed-{seed}", seed, unit, photographs, preset, said)] = seed, unit

            for seed in seeds:
                submit(seed, "start")
            while running:
                done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                while not said.empty():
                    report.say(said.get())
                for future in done:
                    seed, unit = running.pop(future)
                    try:
                        future.result()
                    except BaseException:
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise
                    report.advance(1)
                    if unit == "start":
                        for system in systems:
                            submit(seed, system)


def _one_thread() -> None:
    torch.set_num_threads(1)


def _unit(folder: Path, seed: int, unit: str, photographs: list[Path], preset: str, said: Any) -> None:
    """Does a unit that has not been done; in a process of the pool."""

    def tell(text: str) -> None:
        said.put(f"{folder.name} {unit}: {text}")

    folder.mkdir(exist_ok=True)
    if unit == "start" and not (folder / "start").exists():
        make_start(folder, seed, PRESETS[preset], photographs, tell)
    elif unit != "start" and not (folder / f"{unit}.json").exists():
        run_system(folder, seed, unit, PRESETS[preset], tell)


# --------------------------------------------------------------------------------------------------------------- results


def collect(output: Path, photographs: Sequence[Path], preset: str, command: str) -> Path:
    """Gathers what is there of all seeds and systems into OUT/results, in the form that `report.write_report` reads."""
    results = output / "results"
    results.mkdir(exist_ok=True)
    seeds = sorted((path for path in output.glob("seed-*") if (path / "start").exists()), key=lambda path: int(path.name[5:]))
    outcomes = {
        (int(folder.name[5:]), system): json.loads((folder / f"{system}.json").read_text())
        for folder in seeds
        for system in SYSTEMS
        if (folder / f"{system}.json").exists()
    }
    named = [({"seed": seed, "system": system}, outcome) for (seed, system), outcome in outcomes.items()]
    _write_csv(results / "answers.csv", [who | row for who, outcome in named for row in outcome["answers"]])
    _write_csv(results / "maps.csv", [who | row for who, outcome in named for row in outcome["maps"]])
    _write_csv(results / "systems.csv", [
        who | {"steps": len(outcome["losses"]), "final_loss": _mean(outcome["losses"][-50:]),
               "selected_share": outcome["selected"] and outcome["selected"]["share"], "train_seconds": outcome["seconds"]}
        for who, outcome in named
    ])  # fmt: skip
    selected: dict[str, list[dict[str, float]]] = {system: [] for _, system in outcomes}
    for (_, system), outcome in outcomes.items():
        selected[system] += [outcome["selected"]] if outcome["selected"] else []
    _write_csv(results / "costs.csv", [
        costs(system, PRESETS[preset].sizes, _mean(one["share"] for one in own), _mean(one["tiles"] for one in own))
        for system, own in selected.items()
    ])  # fmt: skip
    about = {
        "command": command,
        "preset": preset,
        "seeds": [int(folder.name[5:]) for folder in seeds],
        "chance": CHANCE,
        "settings": asdict(PRESETS[preset]),
        "starts": {folder.name: json.loads((folder / "start" / "start.json").read_text()) for folder in seeds},
        "versions": {"flexattn_cuda": flexattn_cuda.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    (results / "study.json").write_text(json.dumps(about, indent=1))
    if seeds:
        first = about["seeds"][0]
        given = {system: outcome["answers"] for (seed, system), outcome in outcomes.items() if seed == first}
        draw_examples(results / "examples", seeds[0], first, photographs, given)
    return results


def costs(system: str, sizes: ModelSizes, share: float | None, tiles: float | None) -> dict[str, Any]:
    """A row of costs.csv: the prefill of a question, counted at the study's sizes (GFLOPs) and at LLaVA-1.5-7B's (TFLOPs), with
    the share of HR tokens and the number of tiles that the study's maps select."""
    processor = build_processor(vocabulary(), None, sizes)
    small = build_model(processor, settings_for(system, sizes), sizes).config
    large = flops.as_system(flops.llava_shape("7b"), *_name_and_zoom(system))
    row: dict[str, Any] = {"system": system}
    for name, config, text, unit in (("study_gflops", small, 12, 1e9), ("paper_tflops", large, 80, 1e12)):
        chosen = {} if share is None else {"selected": round(share * config.hr_side**2), "tiles": max(1, round(tiles))}
        spent = flops.cost(config, text, **chosen)
        row |= {f"{name}_published": sum(spent.published.values()) / unit, f"{name}_here": sum(spent.here.values()) / unit}
    return row | {"selected_share": share}


def draw_examples(folder: Path, start: Path, seed: int, photographs: Sequence[Path], given: dict[str, list[dict[str, Any]]]) -> None:
    """The first questions of each task about small objects, with what FlexAttention looked at drawn over the picture."""
    folder.mkdir(exist_ok=True)
    answered = {system: {row["number"]: row for row in rows} for system, rows in given.items()}
    rows = next(iter(answered.values()), {}).values()
    wanted = [row for task in TASKS for row in [r for r in rows if (r["task"], r["size"]) == (task, "small")][:EXAMPLES_PER_TASK]]
    asked = answering.load(start / "flexattn", "cpu") if "flexattn" in given else None
    held_out, listed = find_photographs(photographs, True), []
    for row in wanted:
        (scene,) = make_scenes(held_out, 1, 10 * seed + 1, first=row["number"])
        picture, file = scene.picture, f"{row['number']:04d}.png"
        if asked is not None:
            answer = answering.ask(*asked, picture, row["question"], 4, trace=True)
            picture = answer.draw()
        picture.save(folder / file)
        listed.append({
            "file": f"examples/{file}", "caption": f"{row['task']}, {row['size']} objects", "question": row["question"],
            "expected": row["expected"], "answers": {system: by[row["number"]]["answer"] for system, by in answered.items()},
        })  # fmt: skip
    (folder.parent / "examples.json").write_text(json.dumps(listed, indent=1))


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with open(path, "w", newline="") as file:
        if rows:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()} for row in rows)


def _mean(values: Any) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None
