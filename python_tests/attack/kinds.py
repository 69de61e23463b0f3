"""All kinds of attack."""

from __future__ import annotations

from python_tests.attack.bits import Journals, TrainingCheckpoints
from python_tests.attack.checkpoints import Checkpoints
from python_tests.attack.images import Images
from python_tests.attack.interrupts import Interrupts
from python_tests.attack.kills import KilledAnswers, KilledTraining
from python_tests.attack.operators import DamagedOperators, ValidOperators
from python_tests.attack.runner import Kind
from python_tests.attack.together import Growth, Threads

KINDS = {
    kind.name: kind
    for kind in (
        Kind("operators, valid", ValidOperators, cases=600, short=11),
        Kind("operators, damaged", DamagedOperators, cases=200, short=16),
        Kind("images", Images, cases=2000, seconds=20.0, short=200),
        Kind("bits in journals", Journals, cases=40, short=3),
        Kind("bits in checkpoints", TrainingCheckpoints, cases=40, short=3),
        Kind("exceptions", Interrupts, cases=600, short=20),
        Kind("threads", Threads, cases=20, short=1),
        Kind("long runs", Growth, cases=4, seconds=300.0, short=0),
        Kind("killed ask-batch", KilledAnswers, cases=336, seconds=300.0, short=8),
        Kind("killed train", KilledTraining, cases=64, seconds=300.0, short=0),
        Kind("damaged models", Checkpoints, cases=1000, seconds=90.0, short=6),
    )
}
