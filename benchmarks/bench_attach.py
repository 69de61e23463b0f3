"""What attaching FlexAttention costs a model of another family: load, memory, prompt, token, within one run.

    python benchmarks/bench_attach.py [--shape 1.5b] [--dtype bfloat16] [--rounds 3] [--csv attach.csv]

A random InternVL (Qwen2 behind a small tower) is saved once; then transformers' own class and the same with
FlexAttention take turns, each in a process of its own: it loads the checkpoint, answers a prompt with one image, and
generates greedily. A tenth of the high-resolution tokens is selected in every layer, around the center. "prompt with
HR" includes the encoding of the tiles that they lie in.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tables
import torch
from measuring import machine

TEXT = 80  # tokens of the prompt after the image
SHAPES = {  # of the language model: Qwen2.5's
    "tiny": dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2
    ),
    "0.5b": dict(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2
    ),
    "1.5b": dict(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2
    ),
}
VISION = dict(
    hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, image_size=[448, 448],
    patch_size=[14, 14],
)  # fmt: skip
MEASURES = ("load seconds", "peak GiB", "prompt seconds", "token seconds")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="1.5b", choices=SHAPES, help="language model (default: 1.5b)")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind (default: 3)")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens to generate (default: 16)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table as CSV")
    parser.add_argument("--worker", choices=["plain", "attached"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def save_checkpoint(folder: Path, shape: str, dtype: torch.dtype) -> int:
    """Write a random model; return its number of parameters."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    text = SHAPES[shape] | dict(model_type="qwen2", vocab_size=151674, tie_word_embeddings=True)
    config = InternVLConfig(vision_config=VISION, text_config=text, image_token_id=151667, tie_word_embeddings=True)
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    model.to_empty(device="cpu").to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02, generator=generator).add_(float(parameter.ndim == 1))
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def inputs_of(model: Any, attached: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Return a prompt with one image."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(10, 1000, (TEXT,), generator=generator)
    ids = torch.cat([words[:4], torch.full((256,), model.config.image_token_id), words])[None]
    images = {"pixel_values": torch.randn(1, 3, 448, 448, generator=generator, dtype=dtype)}
    if attached:
        size = 448 * model.flexattn_settings.zoom
        images["pixel_values_hr"] = torch.randn(1, 3, size, size, generator=generator, dtype=dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | images


@torch.inference_mode()
def work(args: argparse.Namespace) -> dict[str, float]:
    """Measure one kind of model in this process."""
    from transformers import AutoModelForImageTextToText

    import flexattn_cuda

    flexattn_cuda.attach  # noqa: B018 (imports are not part of loading)
    dtype, attached = getattr(torch, args.dtype), args.worker == "attached"
    start = time.perf_counter()
    model = AutoModelForImageTextToText.from_pretrained(args.folder, dtype=dtype).eval()
    if attached:
        settings = flexattn_cuda.settings_for(model, "paper")
        flexattn_cuda.attach(model, flexattn_cuda.FlexAttnConfig(**settings.to_dict() | {"strategy": "center"}))
    loaded = time.perf_counter() - start
    inputs, times = inputs_of(model, attached, dtype), []
    begin = time.perf_counter()

    class Clock:
        def put(self, value: Any) -> None:
            times.append(time.perf_counter())

        def end(self) -> None: ...

    options = dict(max_new_tokens=args.new_tokens, min_new_tokens=args.new_tokens, do_sample=False, pad_token_id=0)
    model.generate(**inputs, **options, streamer=Clock())
    steps = [after - before for before, after in zip(times[1:], times[2:])]  # times[0] is the prompt itself
    values = (loaded, peak_gib(), times[1] - begin, statistics.median(steps))
    return dict(zip(MEASURES, values))


def run_worker(kind: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", kind, "--folder", str(folder), "--dtype", args.dtype]
    output = subprocess.run(
        [*command, "--new-tokens", str(args.new_tokens)], capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(output.stdout.splitlines()[-1])
    return found


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.worker:
        print(json.dumps(work(args)))
        return
    results: dict[str, list[dict[str, float]]] = {"plain": [], "attached": []}
    with tempfile.TemporaryDirectory() as folder:
        parameters = save_checkpoint(Path(folder), args.shape, getattr(torch, args.dtype))
        for kind in results:  # once unmeasured, so that the file is in the page cache for both
            run_worker(kind, Path(folder), args)
        for _ in range(args.rounds):
            for kind, found in results.items():
                found.append(run_worker(kind, Path(folder), args))
    medians = {
        kind: {name: statistics.median(one[name] for one in found) for name in MEASURES}
        for kind, found in results.items()
    }
    rows = [
        {
            "measure": name,
            "plain": round(medians["plain"][name], 3),
            "attached": round(medians["attached"][name], 3),
            "ratio": round(medians["attached"][name] / medians["plain"][name], 3),
        }
        for name in MEASURES
    ]
    title = f"{parameters / 1e9:.2f}B parameters, {args.dtype}, {args.rounds} processes of each kind; {machine('cpu')}"
    tables.print_table(title, list(rows[0]), [[str(cell) for cell in row.values()] for row in rows])
    if args.csv:
        columns = {"shape": args.shape, "dtype": args.dtype} | machine("cpu").columns()
        tables.write_csv(args.csv, [columns | row for row in rows])


if __name__ == "__main__":
    main()
