"""The paper's tables: which metric of which task stands in which column, and the paper's own figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: Its title.
        task: Name of the task in lmms-eval.
        metric: Name of the metric.
        published: The paper's figures by system.
        unit: What a metric of 1 is in the table: 100 for percent.
    """

    title: str
    task: str
    metric: str
    published: Mapping[str, float] = field(default_factory=dict)
    unit: float = 100.0


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        name: Its name in files.
        title: What it shows.
        columns: Its columns.
    """

    name: str
    title: str
    columns: tuple[Column, ...]


def _by_system(**figures: float) -> dict[str, float]:
    return figures


_MAGNIFIER = _by_system(llava=26.8, hd=35.0, xattn=32.2, flexattn=35.0, random=31.4, center=30.7)  # with figure 4
_TEXTVQA = _by_system(llava=46.0, hd=45.6, xattn=45.5, flexattn=48.9, random=44.5, center=45.9)

TABLES = (
    Table(
        "table_1",
        "Table 1: general high-resolution benchmarks (random and center: figure 4)",
        (
            Column(
                "V* attribute",
                "vstar_bench_loss",
                "vstar_direct_attributes_acc",
                _by_system(llava=41.7, hd=45.2, xattn=42.6, flexattn=47.8),
            ),
            Column(
                "V* spatial",
                "vstar_bench_loss",
                "vstar_relative_position_acc",
                _by_system(llava=56.6, hd=61.8, xattn=56.6, flexattn=64.5),
            ),
            Column(
                "V* overall",
                "vstar_bench_loss",
                "vstar_acc",
                _by_system(llava=47.6, hd=51.8, xattn=48.2, flexattn=54.5),
            ),
            Column("MagnifierBench", "magnifierbench", "magnifier_acc", _MAGNIFIER),
        ),
    ),
    Table(
        "table_2",
        "Table 2: domain-specific high-resolution benchmarks (random and center: figure 4)",
        (
            Column(
                "RSVQA presence",
                "rsvqa_hrben",
                "rsvqa_presence_acc",
                _by_system(llava=69.8, hd=69.0, xattn=71.4, flexattn=72.2),
            ),
            Column(
                "RSVQA comparison",
                "rsvqa_hrben",
                "rsvqa_comparison_acc",
                _by_system(llava=67.3, hd=67.6, xattn=70.9, flexattn=73.1),
            ),
            Column(
                "RSVQA overall", "rsvqa_hrben", "rsvqa_acc", _by_system(llava=68.4, hd=68.4, xattn=71.1, flexattn=72.7)
            ),
            Column("TextVQA", "textvqa_val", "exact_match", _TEXTVQA),
        ),
    ),
    Table(
        "table_3",
        "Table 3: general benchmarks",
        (
            Column("RefCOCO", "refcoco_sizes", "refcoco_acc", _by_system(llava=75.8, flexattn=79.3)),
            Column("POPE", "pope", "pope_f1_score", _by_system(llava=85.9, flexattn=85.9)),
            Column("GQA", "gqa", "exact_match", _by_system(llava=62.0, flexattn=62.2)),
            Column("VQAv2", "vqav2_val", "exact_match", _by_system(llava=78.5, flexattn=78.7)),
            Column("MME", "mme", "mme_perception_score", _by_system(llava=1511, flexattn=1479), unit=1.0),
        ),
    ),
    Table(
        "table_4",
        "Table 4: RefCOCO by the size of the object",
        (
            Column("large", "refcoco_sizes", "refcoco_large_acc", _by_system(llava=75.9, flexattn=78.8)),
            Column("small", "refcoco_sizes", "refcoco_small_acc", _by_system(llava=41.3, flexattn=51.3)),
            Column("overall", "refcoco_sizes", "refcoco_acc", _by_system(llava=75.4, flexattn=78.4)),
        ),
    ),
)
MAP_TASK = "gqa_map"
PAPER_TASKS = (*dict.fromkeys(column.task for table in TABLES for column in table.columns), MAP_TASK)
"""All but MM-Bench and MM-Vet, whose answers another model judges over the network."""

TFLOPS = {  # of a question, and the seconds of all on a V100, in table 5
    "magnifierbench": {"hd": 24.9, "xattn": 27.1, "flexattn": 17.1},
    "textvqa_val": {"hd": 24.5, "xattn": 26.7, "flexattn": 17.1},
}
SECONDS = {
    "magnifierbench": {"hd": 154, "xattn": 178, "flexattn": 112},
    "textvqa_val": {"hd": 3273, "xattn": 3741, "flexattn": 2839},
}
