"""Damage to bytes, as disks, networks and interrupted programs do it."""

from __future__ import annotations

import random


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return bytes with a flipped bit, another byte, a cut tail, a hole of zeros, a repeated or a lost piece."""
    changed = bytearray(content)
    at = min(rng.randrange(len(changed)), rng.randrange(len(changed)))  # rather in the header
    length = rng.choice((1, 4, 16, 512))
    match rng.randrange(7):
        case 0:
            changed[at] ^= 1 << rng.randrange(8)
        case 1:
            changed[at] = rng.choice((0, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        case 2:
            del changed[at:]
        case 3:
            changed[at : at + length] = bytes(len(changed[at : at + length]))
        case 4:
            changed[at:at] = changed[at : at + length]
        case 5:
            del changed[at : at + length]
        case _:
            for _ in range(8):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def flipped(content: bytes, bit: int) -> bytes:
    """Return bytes with one bit flipped."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
