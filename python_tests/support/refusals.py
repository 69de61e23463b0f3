"""How a command refuses what it cannot use."""

from __future__ import annotations


def refused(result: tuple[int, str, str]) -> str:
    """The sentence on stderr, after it was checked that there is nothing but a sentence."""
    code, out, err = result
    assert code == 2 and out == "" and err.startswith("flexattn: ") and err.count("\n") == 1, result
    assert "Traceback" not in err
    return err
