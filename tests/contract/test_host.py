"""What only the host tier must do: lend views that never change, keep to its memory, share it with other processes."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from polling import wait_until

from kvstore.errors import ConfigError, TierFailed, TierFull
from kvstore.index.entry import ObjectKey
from kvstore.tiers import arena
from kvstore.tiers.host import HostTier, Reserved

MIB = 1 << 20
KEYS = [ObjectKey(bytes(32), bytes([number]) * 32, 0) for number in range(12)]
POOL = random.Random(1).randbytes(8 * MIB)


def content(length: int, start: int = 0) -> bytes:
    return POOL[start : start + length]


def put(tier: HostTier, key: ObjectKey, data: bytes) -> None:
    tier.put(key, bytes(32), data)


def read(tier: HostTier, key: ObjectKey, length: int) -> memoryview:
    view = tier.read(key, length)
    assert view is not None
    return view


def committed_bytes(tier: HostTier) -> int:
    """What the system says."""
    return os.fstat(tier.fd).st_blocks * 512


@pytest.fixture
def tier() -> Iterator[HostTier]:
    tier = HostTier(4 * MIB)
    yield tier
    tier.close()


class AnyOrder(RuleBasedStateMachine):
    """Against a dict of bytes, with views held for as long as the test likes, and dropped on any thread."""

    capacity = 4 * MIB
    memory_max = 5 * MIB

    @initialize()
    def start(self) -> None:
        self.tier = HostTier(self.capacity)
        self.model: dict[ObjectKey, bytes] = {}
        self.views: list[tuple[memoryview, bytes]] = []
        self.arriving: list[Reserved] = []

    @rule(key=st.sampled_from(KEYS), length=st.integers(1, 3 * MIB // 2), start=st.integers(0, 6 * MIB))
    def put(self, key: ObjectKey, length: int, start: int) -> None:
        room = self.tier.room_for(length)
        try:
            put(self.tier, key, content(length, start))
        except TierFull:
            assert not room
        else:
            assert room
            self.model[key] = content(length, start)

    @rule(key=st.sampled_from(KEYS), length=st.integers(1, 2 * MIB), start=st.integers(0, 6 * MIB))
    def make_room_and_put(self, key: ObjectKey, length: int, start: int) -> None:
        """As the engine does."""
        while not self.tier.room_for(length, replacing=key):
            victims = [each for each in self.model if each != key]
            if not victims:
                assert self.tier.waiting_bytes or self.arriving, "with everything gone and unread there is room"
                return
            self.delete(victims[0])
        self.delete(key)
        put(self.tier, key, content(length, start))
        self.model[key] = content(length, start)

    @rule(length=st.integers(1, MIB))
    def reserve(self, length: int) -> None:
        room = self.tier.room_for(length)
        reserved = self.tier.reserve(length)
        assert (reserved is not None) == room
        if reserved is not None:
            self.arriving.append(reserved)

    @precondition(lambda self: self.arriving)
    @rule(key=st.sampled_from(KEYS), start=st.integers(0, 6 * MIB))
    def adopt(self, key: ObjectKey, start: int) -> None:
        reserved = self.arriving.pop()
        self.model[key] = content(len(reserved), start)
        reserved.view[:] = self.model[key]
        self.tier.adopt(key, reserved)

    @precondition(lambda self: self.arriving)
    @rule(late=st.booleans())
    def release(self, late: bool) -> None:
        """`late`: a writer that has not heard of it goes on writing, which hits nobody."""
        reserved = self.arriving.pop(0)
        writer = memoryview(reserved.view) if late else None
        self.tier.release(reserved)
        if writer is not None:
            writer[:] = content(len(writer), 5)
            self.views.append((writer, content(len(writer), 5)))

    @rule(key=st.sampled_from(KEYS))
    def delete(self, key: ObjectKey) -> None:
        assert self.tier.delete(key) == (self.model.pop(key, None) is not None)

    @rule(key=st.sampled_from(KEYS), part=st.floats(0, 1))
    def truncate(self, key: ObjectKey, part: float) -> None:
        length = max(1, int(part * len(self.model.get(key, b""))))
        assert self.tier.truncate(key, length) == (key in self.model)
        if key in self.model:
            self.model[key] = self.model[key][:length]

    @rule(key=st.sampled_from(KEYS), part=st.floats(0, 1))
    def take_a_view(self, key: ObjectKey, part: float) -> None:
        data = self.model.get(key, b"")
        length = int(part * len(data))
        view = self.tier.read(key, length)
        assert (view is None) == (key not in self.model)
        if view is not None:
            self.views.append((view, data[:length]))

    @precondition(lambda self: self.views)
    @rule(data=st.data())
    def drop_a_view(self, data: st.DataObject) -> None:
        del self.views[data.draw(st.integers(0, len(self.views) - 1))]

    @precondition(lambda self: self.views)
    @rule()
    def drop_all_views_on_another_thread(self) -> None:
        thread = threading.Thread(target=self.views.clear)
        thread.start()
        thread.join()

    @invariant()
    def nothing_changes_and_all_is_accounted_for(self) -> None:
        if not hasattr(self, "tier"):
            return
        for view, expected in self.views:
            assert view == expected
        for key, data in self.model.items():
            assert read(self.tier, key, len(data)) == data
            assert self.tier.read(key, len(data) + 1) is None
        lengths = [len(data) for data in self.model.values()] + [len(reserved) for reserved in self.arriving]
        live = sum(map(self.tier.cost_bytes, lengths))
        assert self.tier.used_bytes == live + self.tier.waiting_bytes <= self.capacity
        assert self.tier.objects == len(self.model)
        assert self.views or not self.tier.waiting_bytes
        assert committed_bytes(self.tier) == self.tier.memory_bytes <= self.memory_max

    def teardown(self) -> None:
        if hasattr(self, "tier"):
            self.tier.close()
            for view, expected in self.views:
                assert view == expected, "not even closing changes what is lent"


TestAnyOrder = pytest.mark.slow(AnyOrder.TestCase)
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


def test_a_tier_starts_without_memory_and_commits_what_it_is_given() -> None:
    tier = HostTier(1 << 30)
    assert committed_bytes(tier) == 0
    put(tier, KEYS[0], content(MIB))
    assert committed_bytes(tier) == tier.memory_bytes == tier.used_bytes == MIB
    tier.close()


def test_a_view_is_read_only_and_of_the_memory_itself(tier: HostTier) -> None:
    put(tier, KEYS[0], content(MIB))
    view = read(tier, KEYS[0], MIB)
    assert view.readonly
    with pytest.raises(TypeError):
        view[0] = 0
    (place, length, _) = tier.location(KEYS[0]) or pytest.fail("it is there")
    os.pwrite(tier.fd, b"seen", place)
    assert bytes(view[:4]) == b"seen"
    assert length == MIB


def test_the_place_of_an_object_is_free_when_its_last_view_dies(tier: HostTier) -> None:
    put(tier, KEYS[0], content(3 * MIB))
    first = read(tier, KEYS[0], 10)
    second = first[2:4]
    del first
    assert tier.delete(KEYS[0])
    assert tier.read(KEYS[0], 1) is None
    assert (tier.objects, tier.used_bytes, tier.waiting_bytes) == (0, 3 * MIB, 3 * MIB)
    assert not tier.room_for(2 * MIB)
    with pytest.raises(TierFull):
        put(tier, KEYS[1], content(2 * MIB))
    assert second == content(10)[2:4]
    del second
    assert (tier.used_bytes, tier.waiting_bytes) == (0, 0)
    assert tier.room_for(4 * MIB)


def test_a_view_in_a_reference_cycle_is_given_back_by_the_collector(tier: HostTier) -> None:
    put(tier, KEYS[0], content(MIB))
    cycle: list[object] = [read(tier, KEYS[0], MIB)]
    cycle.append(cycle)
    tier.delete(KEYS[0])
    del cycle
    gc.collect()
    assert tier.used_bytes == 0


def test_a_cut_object_gives_back_its_tail_when_nobody_reads_it(tier: HostTier) -> None:
    put(tier, KEYS[0], content(MIB))
    view = read(tier, KEYS[0], MIB)
    assert tier.truncate(KEYS[0], MIB // 2)
    put(tier, KEYS[1], content(2 * MIB, 100))
    assert view == content(MIB)
    assert (tier.used_bytes, tier.waiting_bytes) == (3 * MIB, MIB // 2)
    del view
    assert (tier.used_bytes, tier.waiting_bytes) == (2 * MIB + MIB // 2, 0)
    assert tier.truncate(KEYS[0], MIB)
    assert tier.read(KEYS[0], MIB) is None, "what is cut does not grow again"


def test_free_memory_in_pieces_serves_large_objects(tier: HostTier) -> None:
    """Every second object goes; what is left in between is too small for anything larger, but memory is not lost."""
    capacity = 32 * MIB
    tier = HostTier(capacity)
    many = [ObjectKey(bytes(32), number.to_bytes(32, "big"), 0) for number in range(256)]
    for number, key in enumerate(many):
        put(tier, key, content(capacity // 256, number))
    assert tier.used_bytes == capacity
    for key in many[::2]:
        tier.delete(key)
    for key in KEYS[:4]:
        put(tier, key, content(capacity // 8))
    assert tier.used_bytes == capacity
    assert tier.remapped_bytes > capacity // 4
    assert committed_bytes(tier) == tier.memory_bytes <= capacity + capacity // 16
    assert tier.fragmentation_ratio == 0, "these objects are whole pages"
    for number, key in list(enumerate(many))[1::2]:
        assert read(tier, key, capacity // 256) == content(capacity // 256, number)
    assert all(read(tier, key, capacity // 8) == content(capacity // 8) for key in KEYS[:4])
    tier.close()


def test_a_location_leads_another_process_to_the_bytes(tier: HostTier) -> None:
    put(tier, KEYS[0], content(MIB))
    put(tier, KEYS[1], content(MIB, 77))
    place = tier.location(KEYS[1])
    assert place is not None
    program = (
        "import hashlib, mmap, os, sys; offset, length = map(int, sys.argv[2:]);"
        "fd = os.open(f'/proc/{os.getppid()}/fd/{sys.argv[1]}', os.O_RDONLY);"
        "shared = mmap.mmap(fd, 0, prot=mmap.PROT_READ);"
        "print(hashlib.sha256(shared[offset:offset + length]).hexdigest())"
    )
    arguments = [sys.executable, "-c", program, str(tier.fd), str(place.offset), str(place.length)]
    seen = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.strip()
    assert seen == hashlib.sha256(content(MIB, 77)).hexdigest()


def test_the_generation_tells_that_bytes_are_not_what_they_were(tier: HostTier) -> None:
    assert tier.location(KEYS[0]) is None
    put(tier, KEYS[0], content(MIB))
    first = tier.location(KEYS[0])
    put(tier, KEYS[1], content(MIB))
    tier.read(KEYS[0], 10)
    tier.truncate(KEYS[0], MIB)
    assert tier.location(KEYS[0]) == first, "nothing has happened to it"
    tier.truncate(KEYS[0], MIB - 1)
    cut = tier.location(KEYS[0])
    put(tier, KEYS[0], content(MIB))
    replaced = tier.location(KEYS[0])
    tier.delete(KEYS[0])
    put(tier, KEYS[0], content(MIB))
    again = tier.location(KEYS[0])
    seen = [place.generation for place in (first, cut, replaced, again) if place is not None]
    assert len(seen) == len(set(seen)) == 4


@pytest.mark.slow
def test_readers_on_threads_never_see_another_objects_bytes() -> None:
    """Each version is one number over and over: a reader would notice a single foreign word."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads change places between any two steps
    tier = HostTier(2 * MIB)
    problems: list[str] = []
    seen = [0, 0]
    stop = threading.Event()

    def check(which: int) -> None:
        rng = random.Random(which)
        while not stop.is_set():
            number = rng.randrange(len(KEYS))
            view = tier.read(KEYS[number], 8 * rng.randint(1, 1000))
            if view is not None:
                words = np.frombuffer(view, np.uint64)
                if words[0] % len(KEYS) != number or (words != words[0]).any():
                    problems.append(f"key {number}: {set(words.tolist())}")
                seen[which] += 1

    readers = [threading.Thread(target=check, args=(which,)) for which in range(2)]
    for reader in readers:
        reader.start()
    try:
        rng = random.Random(9)
        for version in range(1, 4000):
            number = rng.randrange(len(KEYS))
            data = np.full(rng.randint(1, 40_000), version * len(KEYS) + number, np.uint64).tobytes()
            for victim in rng.sample(KEYS, len(KEYS)):
                if tier.room_for(len(data)):
                    break
                tier.delete(victim)
            if tier.room_for(len(data)):
                tier.put(KEYS[number], bytes(32), data)
            tier.truncate(rng.choice(KEYS), 8 * rng.randint(1, 40_000))
        wait_until(lambda: all(count > 100 for count in seen), "readers have read")
    finally:
        sys.setswitchinterval(interval_s)
        stop.set()
        for reader in readers:
            reader.join()
    for key in KEYS:
        tier.delete(key)
    assert not problems
    assert (tier.used_bytes, tier.waiting_bytes) == (0, 0)
    tier.close()


def test_without_memory_a_put_fails_and_changes_nothing(tier: HostTier, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tier, KEYS[0], content(MIB + 100))
    before = (tier.used_bytes, tier.memory_bytes)
    allocate = os.posix_fallocate

    def half(descriptor: int, offset: int, length: int) -> None:
        allocate(descriptor, offset, length // 2)
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(os, "posix_fallocate", half)
    for key in KEYS[:2]:
        with pytest.raises(TierFailed, match="no memory for the host tier") as raised:
            put(tier, key, content(2 * MIB))
        assert raised.value.context["errno"] == errno.ENOMEM
        assert (tier.used_bytes, tier.memory_bytes) == before
        assert committed_bytes(tier) == tier.memory_bytes
        assert read(tier, KEYS[0], MIB + 100) == content(MIB + 100)
    monkeypatch.undo()
    put(tier, KEYS[1], content(2 * MIB))
    assert read(tier, KEYS[1], 2 * MIB) == content(2 * MIB)


def test_a_capacity_beyond_the_processs_addresses_is_refused_in_one_line() -> None:
    program = (
        "import resource; from kvstore.errors import ConfigError; from kvstore.tiers.host import HostTier\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "try: HostTier(8 << 30)\n"
        "except ConfigError as error: print('refused:', error)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("refused: host_capacity: ")
    assert "ulimit -v" in run.stdout
    assert run.stdout.count("\n") == 1


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_closing_twice_and_forgetting_to_close_leave_nothing_open() -> None:
    before = open_files()
    tier = HostTier(MIB)
    put(tier, KEYS[0], b"x")
    tier.close()
    tier.close()
    assert open_files() == before
    HostTier(MIB)
    gc.collect()
    assert open_files() == before


# Huge pages


def pretend_thp(folder: Path, monkeypatch: pytest.MonkeyPatch, allowed: str) -> None:
    (folder / "shmem_enabled").write_text(f"always within_size {allowed} force\n")
    (folder / "hpage_pmd_size").write_text("2097152\n")
    monkeypatch.setattr(arena, "_THP", folder)


@pytest.mark.parametrize("allowed", ["advise [never] deny", "advise never [deny]", None])
def test_huge_pages_that_the_system_does_not_allow_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: str | None
) -> None:
    if allowed is None:
        monkeypatch.setattr(arena, "_THP", tmp_path / "nothing")
    else:
        pretend_thp(tmp_path, monkeypatch, allowed)
    with pytest.raises(ConfigError, match="echo advise"):
        HostTier(MIB, huge_pages=True)


def test_huge_pages_are_taken_and_given_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system allows them, they are huge; where not, as much memory in small ones."""
    if not any(word in (arena._THP / "shmem_enabled").read_text() for word in ("[advise]", "[always]", "[force]")):
        pretend_thp(tmp_path, monkeypatch, "[advise] never deny")
    tier = HostTier(64 * MIB, huge_pages=True)
    keys = [ObjectKey(bytes(32), number.to_bytes(32, "big"), 0) for number in range(64)]
    rng = random.Random(5)
    for round_ in range(6):
        for number, key in enumerate(keys):
            data = content(int(MIB * (1 + 0.2 * round_)), number)
            while not tier.room_for(len(data), replacing=key):
                tier.delete(rng.choice(keys))
            tier.delete(key)
            put(tier, key, data)
            assert read(tier, key, len(data)) == data
        assert committed_bytes(tier) == tier.memory_bytes <= 68 * MIB
        assert tier.memory_bytes % (2 * MIB) == 0
    assert tier.used_bytes > 40 * MIB
    tier.close()
