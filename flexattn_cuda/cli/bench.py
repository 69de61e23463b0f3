"""flexattn bench"""

from __future__ import annotations

from flexattn_cuda.cli.runner import silence_transformers
from flexattn_cuda.tasks.options import BenchOptions


def bench(options: BenchOptions) -> None:
    """Measure latency, throughput and memory on this machine, by system and resolution.

    Examples:
        flexattn bench
        flexattn bench --shape 7b --zooms 2,3,4 --csv bench.csv --plot bench.png
        flexattn bench --model my-model --systems llava,flexattn --batch-size 8 --selected 518
    """
    silence_transformers()
    from flexattn_cuda.cli.bench_table import bench_table, bench_title
    from flexattn_cuda.cli.console import print_all
    from flexattn_cuda.runs.progress import Progress
    from flexattn_cuda.tasks import bench as benching

    prepared = benching.prepare_bench(options)
    rows = []
    with Progress(len(prepared.cases), "rows") as progress:
        for row in benching.bench(prepared, silence_transformers):
            rows.append(row)
            progress.advance(1)
    print_all(bench_title(prepared), bench_table(rows))
    if options.csv is not None:
        benching.write_bench(prepared, rows, options.csv)
    if options.plot is not None:
        benching.plot_bench(prepared, rows, options.plot)
    for path in filter(None, (options.csv, options.plot)):
        progress.say(f"wrote {path}")
