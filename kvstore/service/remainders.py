"""What a reader lacks of objects that it has the beginning of."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing


async def remainders(
    objects: AsyncGenerator[memoryview, None], held_bytes: Sequence[int]
) -> AsyncGenerator[memoryview, None]:
    """`objects` without the first `held_bytes` of each (empty: whole); ends with the first that has no more."""
    async with aclosing(objects):
        index = 0
        async for stored in objects:
            rest = stored[held_bytes[index] :] if held_bytes else stored
            if not rest:
                return
            yield rest
            index += 1
