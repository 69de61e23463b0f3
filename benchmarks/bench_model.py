"""The cost of FlexAttention relative to the same language model without it: prefill and decode, within one run.

    python benchmarks/bench_model.py [--repetitions 5] [--csv model.csv] [--json model.json] [--plots DIR]
    python benchmarks/bench_model.py --device cuda --shape 7b --dtype float16

One random backbone, one prompt, image features given, logits of the last row only. The systems take turns, prefill by
prefill and token by token, and medians are compared. Selections are forced: a share of the HR tokens, the same in every
layer, chosen once (or, "churn", a tenth of it new at every step); the maps and the selection from them are computed all
the same. "off" projects all selected tokens again in every layer at every step, as the released code does.
"""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

import tables
import torch
from measuring import machine
from model_cost.backbone import SHAPES, SIDE, TEXT, Backbone
from model_cost.measure import count_encoded_tiles, measure
from model_cost.results import Where, Zoom, make_rows, plot, print_ratios, print_rows, ratios
from model_cost.systems import BY_ZOOM, SYSTEMS

from flexattn_cuda.analysis.measuring import Meter

ZOOM = 3


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="default", choices=SHAPES, help="language model (default: default)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens to generate (default: 16)")
    parser.add_argument("--repetitions", type=int, default=5, help="prompts to measure (default: 5)")
    parser.add_argument("--zooms", default="", help="image sizes to plot, e.g. 1,2,4,5,6; 3 is always measured")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table as CSV")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the ratios as JSON")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write plots")
    args = parser.parse_args(arguments)
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"there is no GPU for --device {args.device}")
    if args.plots and find_spec("matplotlib") is None:
        parser.error("--plots needs matplotlib: pip install matplotlib")
    return args


def measure_zooms(args: argparse.Namespace, dtype: torch.dtype, meter: Meter) -> list[Zoom]:
    """Measure a few systems at every image size of --zooms, and at `ZOOM`."""
    if not args.zooms:
        return []
    found = []
    for zoom in sorted({ZOOM, *(int(zoom) for zoom in args.zooms.split(",") if zoom)}):
        backbone = Backbone(SHAPES[args.shape], zoom, dtype, args.device)
        found.append(Zoom(zoom, make_rows(measure(backbone, BY_ZOOM, tokens=4, repetitions=2, meter=meter))))
    return found


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    meter, dtype = Meter(args.device), getattr(torch, args.dtype)
    where = Where(machine(args.device), args.shape, args.dtype, args.threads)

    backbone = Backbone(SHAPES[args.shape], ZOOM, dtype, args.device)
    found = measure(backbone, SYSTEMS, args.new_tokens, args.repetitions, meter)
    zooms = measure_zooms(args, dtype, meter)
    numbers = ratios(found) | {"tiles_encoded_2_of_9": count_encoded_tiles()}
    table = Zoom(ZOOM, make_rows(found))

    title = f"{args.shape}: {SIDE**2 + TEXT} positions, {args.new_tokens} new tokens"
    print_rows(f"{title}, medians of {args.repetitions} repetitions; {where.machine}", table.rows)
    print_ratios(numbers, limited=args.shape == "default" and args.device == "cpu")
    if args.csv:
        others = [zoom for zoom in zooms if zoom.zoom != ZOOM]
        tables.write_csv(args.csv, [row for zoom in (table, *others) for row in zoom.columns(where)])
    if args.json:
        args.json.write_text(json.dumps(where.columns() | {"ratios": numbers}, indent=2) + "\n")
    if args.plots:
        plot(args.plots, found, zooms)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
