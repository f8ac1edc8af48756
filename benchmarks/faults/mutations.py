"""Ways to spoil a file that a stage reads: blind ones for any bytes, and ones that know JSON, .npy headers and words."""

import json
import random
import re
from collections.abc import Callable
from typing import Any

# Where a number belongs. The longest has more digits than Python reads.
NUMBERS = (0, -1, 1, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 10**12, 10**30, 10**400, -(10**400), 1.5, 1e308, 1e-320)
STRINGS = ("", "5", "../../../tmp/owned", "/etc/passwd", "\x00", "\ud800", "a" * 5000, "٣", "nan", "hidden_states")
RAW = ("NaN", "Infinity", "-Infinity", "1e999", "[" * 200_000, '{"a":' * 50_000, "9" * 5000, '"\\ud800"', "tru", "//")
WORDS = (0, 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)
PLACE = "\ue000 raw \ue000"


def mutate(data: bytes, name: str, rng: random.Random) -> bytes:
    """One to three mutations of a file of this name, which fit its kind two times in three."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if rng.random() < 0.34:
            data = rng.choice(BLIND)(data, rng)
        elif name.endswith((".json", ".jsonl")):
            data = mutate_json(data, rng)
        elif name.endswith(".npy") and rng.random() < 0.7:
            data = mutate_text_numbers(data, rng, 128)
        elif name.endswith((".txt",)):
            data = mutate_text_numbers(data, rng, len(data))
        else:
            data = mutate_words(data, rng)
    return data


# ---- Of any bytes


def _spot(data: bytes, rng: random.Random) -> tuple[int, int]:
    """Where a block begins and ends; headers are hit as often as all the rest."""
    start = rng.randrange(max(min(len(data), rng.choice((64, 2048, len(data)))), 1))
    return start, min(start + rng.choice((1, 2, 8, 100, 5000)), len(data))


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice((0, 1, rng.randrange(len(data) + 1), max(len(data) - rng.randrange(1, 20), 0)))]


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    spoiled = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 50))):
        if spoiled:
            spoiled[_spot(data, rng)[0]] ^= 1 << rng.randrange(8)
    return bytes(spoiled)


def remove_block(data: bytes, rng: random.Random) -> bytes:
    start, end = _spot(data, rng)
    return data[:start] + data[end:]


def repeat_block(data: bytes, rng: random.Random) -> bytes:
    start, end = _spot(data, rng)
    return data[:end] + data[start:end] * rng.choice((1, 2, 100)) + data[end:]


def overwrite_block(data: bytes, rng: random.Random) -> bytes:
    start, end = _spot(data, rng)
    block = rng.choice((bytes(end - start), b"\xff" * (end - start), rng.randbytes(end - start)))
    return data[:start] + block + data[end:]


def append_bytes(data: bytes, rng: random.Random) -> bytes:
    return data + rng.choice((b"\x00", b"]", b"\n{}", rng.randbytes(64)))


def replace_all(data: bytes, rng: random.Random) -> bytes:
    return rng.choice(
        (b"", b"PK\x03\x04" + data, b"\x80\x04.", b"\xef\xbb\xbf" + data, b"\x89HDF\r\n\x1a\n", rng.randbytes(200))
    )


BLIND: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    truncate,
    flip_bits,
    remove_block,
    repeat_block,
    overwrite_block,
    append_bytes,
    replace_all,
)


# ---- Of files whose kind is known


def mutate_words(data: bytes, rng: random.Random) -> bytes:
    """Write a size that lies over 4 or 8 bytes: HDF5's and pickle's lengths are such words."""
    width = rng.choice((4, 8))
    if len(data) < width:
        return data
    at = _spot(data[: len(data) - width + 1], rng)[0]
    return data[:at] + (rng.choice(WORDS) % 2 ** (8 * width)).to_bytes(width, "little") + data[at + width :]


def mutate_text_numbers(data: bytes, rng: random.Random, n_bytes: int) -> bytes:
    """Another number, or something else, in the place of one in the first bytes, such as a shape in a .npy header."""
    found = list(re.finditer(rb"\d+", data[:n_bytes]))
    if not found:
        return flip_bits(data, rng)
    spot = rng.choice(found)
    new = rng.choice(
        (b"1000000000000", b"0", b"-1", b"9" * 5000, b"()", b"1e9", str(rng.choice(NUMBERS)).encode()[:5000])
    )
    if rng.random() < 0.5:  # keep the length, so that what follows stays where it is said to be
        new = new[: spot.end() - spot.start()].rjust(spot.end() - spot.start(), b"9")
    return data[: spot.start()] + new + data[spot.end() :]


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Change a value somewhere inside, or the structure around it; lines of JSON one at a time."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        lines = data.split(b"\n")
        if len(lines) < 2:
            return flip_bits(data, rng)
        at = rng.randrange(len(lines))
        lines[at] = mutate_json(lines[at], rng)
        return b"\n".join(lines)
    raw = rng.choice(RAW)
    value = _changed(value, rng)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    text = text.replace(json.dumps(PLACE), raw).replace(json.dumps(PLACE, ensure_ascii=False), raw)
    return text.encode("utf-8", "surrogatepass")


def _changed(value: Any, rng: random.Random) -> Any:
    parents = [value]
    while isinstance(parents[-1], (dict, list)) and parents[-1] and rng.random() < 0.85:
        children = list(parents[-1].values()) if isinstance(parents[-1], dict) else parents[-1]
        parents.append(rng.choice(children))
    inside = [parent for parent in parents if isinstance(parent, (dict, list)) and parent]
    if not inside or rng.random() < 0.05:
        return _hostile(value, rng)
    parent: Any = inside[-1]
    key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
    kind = rng.randrange(6)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, list):
        parent.insert(key, parent[key])
    elif kind == 1:
        parent[str(_hostile(key, rng))[:5000]] = parent[key]
    elif kind == 2 and isinstance(parent, list):
        other = rng.randrange(len(parent))
        parent[key], parent[other] = parent[other], parent[key]
    elif kind == 2:
        parent[str(rng.choice(NUMBERS[:8]))] = parent.pop(key)
    else:
        parent[key] = _hostile(parent[key], rng)
    return value


def _hostile(value: Any, rng: random.Random) -> Any:
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(NUMBERS)
    others = (rng.choice(STRINGS), PLACE, rng.choice((None, True, False)), [value], {"0": value, "a": [value] * 3})
    return others[kind - 3]
