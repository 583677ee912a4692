"""Mutations of canonical JSON as JSON: bytes changed blindly are hardly ever canonical again."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

#: in the order of JSON's types; a canonical float is {"float": hexadecimal}
_ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**64, 10**400, "", "a", "\ud800", "full", "state", "llama3", "inf",
    *(float(number).hex() for number in (0.0, 1.0, 2.0**-60, 1e300, 5e-324)),
    [], [1], [[1]], [["a", 1]], {}, {"a": 1}, {"float": "0x1p+0"}, {"float": "inf"}, {"float": 1},
]  # fmt: skip


def mutated(data: bytes, seed: int) -> bytes | None:
    """The JSON of `data` with one to three of its values changed, or None where it is no JSON."""
    rng = random.Random(seed)
    try:
        value = json.loads(data)
        for _ in range(rng.randint(1, 3)):
            value = _changed(value, rng)
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=rng.random() < 0.1).encode()
    except (ValueError, TypeError, RecursionError):
        return None


def _changed(value: Any, rng: random.Random) -> Any:
    """One value of all that there are becomes another, goes, or gets a neighbour."""
    places = list(_places(value))
    if not places or rng.random() < 0.02:
        return copy.deepcopy(rng.choice(_ODD))
    holder, key = rng.choice(places)
    old, action = holder[key], rng.random()
    if action < 0.1:
        del holder[key]
    elif action < 0.15 and isinstance(holder, dict):
        holder[rng.choice(["", "float", "layers", "x"])] = copy.deepcopy(rng.choice(_ODD))
    elif action < 0.2 and isinstance(holder, list):
        holder.append(old)
    elif action < 0.5 and isinstance(old, int):
        holder[key] = old + rng.choice([-1, 1, 16, old, -2 * old])
    else:
        holder[key] = copy.deepcopy(rng.choice(_ODD))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(object or array, key or index) of every value inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _places(item)
