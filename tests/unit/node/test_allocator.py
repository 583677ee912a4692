"""Offsets and accounting of the arena's allocator, against a map of every unit of the address space."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.tiers.allocator import ALIGNMENT_BYTES, Allocator, Placement, Range, aligned

UNIT = ALIGNMENT_BYTES
PAGE = 8 * UNIT
MEMORY_PAGES, SPACE_PAGES = 8, 32
USED, WARM, COLD = "used", "warm", "cold"


class AnyOrder(RuleBasedStateMachine):
    """A model that knows the state of every unit, and from the states alone what the allocator's answers must be."""

    @initialize()
    def start(self) -> None:
        self.allocator = Allocator(SPACE_PAGES * PAGE, MEMORY_PAGES * PAGE, PAGE)
        self.units = [COLD] * (SPACE_PAGES * PAGE // UNIT)
        self.blocks: list[Range] = []

    def state(self, place: Range) -> set[str]:
        return set(self.units[place.start // UNIT : place.end // UNIT])

    def mark(self, place: Range, state: str) -> None:
        self.units[place.start // UNIT : place.end // UNIT] = [state] * (place.length // UNIT)

    def apply(self, placement: Placement, length: int) -> Range:
        for pages in placement.give_up:
            assert self.state(pages) == {WARM}, "only free memory is given up"
            self.mark(pages, COLD)
        for pages in placement.cold:
            assert self.state(pages) == {COLD}, "what is said to be without memory is"
            self.mark(pages, WARM)
        block = Range(placement.offset, placement.offset + length)
        assert self.state(block) == {WARM}, "nobody else's, and with memory"
        self.mark(block, USED)
        return block

    @rule(units=st.integers(1, MEMORY_PAGES * PAGE // UNIT + 1))
    def place(self, units: int) -> None:
        length = units * UNIT
        fits = self.allocator.fits(length)
        placement = self.allocator.place(length)
        assert (placement is not None) == fits
        if placement is not None:
            self.blocks.append(self.apply(placement, length))
        else:
            used_pages = sum(USED in self.state(Range(at, at + PAGE)) for at in range(0, SPACE_PAGES * PAGE, PAGE))
            # Refused only where memory, by the page, is short: in this much space a gap is always large enough.
            assert (used_pages * PAGE) + aligned(length, PAGE) > MEMORY_PAGES * PAGE

    @rule(units=st.integers(1, MEMORY_PAGES * PAGE // UNIT))
    def place_and_fail_to_write(self, units: int) -> None:
        placement = self.allocator.place(units * UNIT)
        if placement is not None:
            self.mark(self.apply(placement, units * UNIT), WARM)
            self.allocator.retract(placement, units * UNIT)
            for pages in placement.cold:
                self.mark(pages, COLD)

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        block = self.blocks.pop(data.draw(st.integers(0, len(self.blocks) - 1)))
        self.allocator.free(block.start, block.length)
        self.mark(block, WARM)

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def free_a_tail(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.blocks) - 1))
        block = self.blocks[index]
        kept = UNIT * data.draw(st.integers(1, block.length // UNIT))
        self.blocks[index] = Range(block.start, block.start + kept)
        if kept < block.length:
            self.allocator.free(block.start + kept, block.length - kept)
            self.mark(Range(block.start + kept, block.end), WARM)

    @precondition(lambda self: self.blocks)
    @rule(data=st.data(), units=st.integers(1, MEMORY_PAGES * PAGE // UNIT))
    def place_once_another_is_free(self, data: st.DataObject, units: int) -> None:
        block = self.blocks.pop(data.draw(st.integers(0, len(self.blocks) - 1)))
        promised = self.allocator.fits(units * UNIT, block)
        self.allocator.free(block.start, block.length)
        self.mark(block, WARM)
        placement = self.allocator.place(units * UNIT)
        assert placement is not None or not promised
        if placement is not None:
            self.blocks.append(self.apply(placement, units * UNIT))

    @invariant()
    def accounts_are_exact(self) -> None:
        if not hasattr(self, "allocator"):
            return
        counts = {state: self.units.count(state) * UNIT for state in (USED, WARM, COLD)}
        assert self.allocator.used_bytes == counts[USED] == sum(block.length for block in self.blocks)
        assert self.allocator.memory_bytes == counts[USED] + counts[WARM] <= MEMORY_PAGES * PAGE
        stranded = sum(
            self.units[page : page + PAGE // UNIT].count(WARM)
            for page in range(0, len(self.units), PAGE // UNIT)
            if USED in self.units[page : page + PAGE // UNIT]
        )
        assert self.allocator.stranded_bytes == stranded * UNIT


TestAnyOrder = pytest.mark.slow(AnyOrder.TestCase)
TestAnyOrder.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def placed(allocator: Allocator, length: int) -> Placement:
    placement = allocator.place(length)
    assert placement is not None
    return placement


def test_a_block_takes_the_smallest_free_place_that_has_memory() -> None:
    allocator = Allocator(64 * PAGE, 16 * PAGE, PAGE)
    blocks = [placed(allocator, length).offset for length in (4 * PAGE, UNIT, 2 * PAGE, UNIT, 3 * PAGE, UNIT)]
    for index, length in ((0, 4 * PAGE), (2, 2 * PAGE), (4, 3 * PAGE)):
        allocator.free(blocks[index], length)
    assert placed(allocator, 2 * PAGE + UNIT) == (blocks[4], (), ())


def test_blocks_share_pages_and_new_memory_is_taken_page_by_page() -> None:
    allocator = Allocator(64 * PAGE, 16 * PAGE, PAGE)
    assert placed(allocator, PAGE + UNIT) == (0, (Range(0, 2 * PAGE),), ())
    assert placed(allocator, PAGE) == (PAGE + UNIT, (Range(2 * PAGE, 3 * PAGE),), ())
    assert (allocator.used_bytes, allocator.memory_bytes) == (2 * PAGE + UNIT, 3 * PAGE)


def test_memory_free_in_pieces_is_exchanged_for_memory_in_one() -> None:
    allocator = Allocator(64 * PAGE, 8 * PAGE, PAGE)
    blocks = [placed(allocator, 2 * PAGE).offset for _ in range(4)]
    assert not allocator.fits(UNIT)
    for offset in (blocks[0], blocks[2]):
        allocator.free(offset, 2 * PAGE)
    placement = placed(allocator, 3 * PAGE)
    assert placement.offset == 8 * PAGE
    assert sum(pages.length for pages in placement.give_up) == 3 * PAGE
    assert (allocator.memory_bytes, allocator.given_up_bytes) == (8 * PAGE, 3 * PAGE)
    assert allocator.fits(PAGE)
    assert not allocator.fits(PAGE + UNIT)


def test_a_gap_is_used_with_what_memory_it_has() -> None:
    allocator = Allocator(64 * PAGE, 9 * PAGE, PAGE)
    blocks = [placed(allocator, 2 * PAGE).offset for _ in range(4)]
    allocator.free(blocks[3], 2 * PAGE)
    assert placed(allocator, 3 * PAGE) == (6 * PAGE, (Range(8 * PAGE, 9 * PAGE),), ())


@pytest.mark.slow
@given(seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_with_objects_of_many_pages_all_of_the_capacity_can_be_used(seed: int) -> None:
    """An arena's spare memory, a sixteenth, covers what is stranded: nothing is refused that the capacity allows."""
    rng = random.Random(seed)
    capacity = 64 << 20
    allocator = Allocator(4 * capacity, capacity + capacity // 16, 4096)
    blocks: list[tuple[int, int]] = []
    for _ in range(1500):
        length = aligned(int(rng.choice((30_000, 120_000, 1_000_000)) * rng.uniform(0.9, 1.1)))
        while allocator.used_bytes + length > capacity:
            allocator.free(*blocks.pop(rng.randrange(len(blocks))))
        blocks.append((placed(allocator, length).offset, length))
    assert allocator.used_bytes > 0.9 * capacity
    assert allocator.stranded_bytes < 0.0625 * capacity
