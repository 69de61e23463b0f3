r"""Training data in LLaVA's format: read, checked before anything is trained, and turned into tensors.

    [{"id": ..., "image": "a.jpg" or ["a.jpg", "b.jpg"],
      "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                        {"from": "gpt", "value": "A cat."}, ...]}, ...]

Records are numbered from 0. A bad record is reported and skipped.
"""

from flexattn_cuda.tasks.training_data.checks import Checked, check
from flexattn_cuda.tasks.training_data.dataset import Collator, Conversations
from flexattn_cuda.tasks.training_data.labels import IGNORED, LabelledIds, encode, labelled_ids
from flexattn_cuda.tasks.training_data.records import Broken, BrokenRecordError, Conversation, Turn, parse, read_records

__all__ = [
    "IGNORED",
    "Broken",
    "BrokenRecordError",
    "Checked",
    "Collator",
    "Conversation",
    "Conversations",
    "LabelledIds",
    "Turn",
    "check",
    "encode",
    "labelled_ids",
    "parse",
    "read_records",
]
