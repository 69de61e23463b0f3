"""All kinds of attack."""

from __future__ import annotations

from python_tests.attack.checkpoints import Checkpoints
from python_tests.attack.images import Images
from python_tests.attack.kills import KilledAnswers, KilledTraining
from python_tests.attack.operators import DamagedOperators, ValidOperators
from python_tests.attack.runner import Kind

KINDS = {
    kind.name: kind
    for kind in (
        Kind("operators, valid", ValidOperators, cases=600, short=22),
        Kind("operators, damaged", DamagedOperators, cases=200, short=16),
        Kind("images", Images, cases=2000, seconds=20.0, short=300),
        Kind("killed ask-batch", KilledAnswers, cases=240, short=16),
        Kind("killed train", KilledTraining, cases=64, seconds=120.0, short=0),
        Kind("checkpoints", Checkpoints, cases=1200, seconds=30.0, short=16),
    )
}
