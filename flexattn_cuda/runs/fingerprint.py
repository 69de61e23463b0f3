"""What must stay the same for a run to be resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexattn_cuda.errors import InputError


@dataclass(frozen=True)
class Fingerprint:
    """Facts about a run by name, each a value that JSON can hold.

    A run is resumed only if its fingerprint equals that of the run before.
    """

    facts: Mapping[str, Any]

    def with_facts(self, **facts: Any) -> Fingerprint:
        """Return a copy with facts added or replaced; underscores in their names become spaces."""
        return Fingerprint({**self.facts, **{name.replace("_", " "): value for name, value in facts.items()}})

    def without(self, *names: str) -> Fingerprint:
        """Return a copy without some facts."""
        return Fingerprint({name: value for name, value in self.facts.items() if name not in names})

    def require_same(self, earlier: Fingerprint, what: str, instead: str = "") -> None:
        """Raise InputError if a fact differs from that of an earlier run.

        Args:
            earlier: The facts of that run.
            what: Its name.
            instead: What else can be done with it.
        """
        changed = [name for name, value in self.facts.items() if earlier.facts.get(name) != value]
        if changed:
            raise InputError(
                f"{what} was started with other options ({', '.join(changed)}); "
                f"repeat them to resume it, {instead and f'{instead}, '}or discard it with --restart"
            )

    def to_json(self) -> str:
        return json.dumps(dict(self.facts))

    @classmethod
    def read(cls, path: Path) -> Fingerprint:
        """Read what `to_json` wrote; raise InputError if the file holds anything else."""
        try:
            facts = json.loads(path.read_text())
        except (ValueError, RecursionError):
            facts = None
        if not isinstance(facts, dict):
            raise InputError(f"{path} does not hold the options of a run; remove it, or discard the run with --restart")
        return cls(facts)
