"""What the process asks of the allocator, in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

ALLOCATE = """
import ctypes, re, sys, tempfile, threading
from kvstore.memory import share_arenas

if sys.argv[1] == "shared":
    share_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
all_there = threading.Barrier(8)

def allocate():
    libc.malloc(1000)
    all_there.wait()

threads = [threading.Thread(target=allocate) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc.fopen.restype = ctypes.c_void_p
with tempfile.NamedTemporaryFile() as told:
    file = ctypes.c_void_p(libc.fopen(told.name.encode(), b"w"))
    assert libc.malloc_info(0, file) == 0
    libc.fclose(file)
    print(len(re.findall("<heap nr=", told.read().decode())))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's arenas")
def test_threads_share_two_arenas() -> None:
    def arenas(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", ALLOCATE, how], check=True, capture_output=True, text=True)
        return int(done.stdout)

    assert arenas("own") > 2  # so this sees them
    assert arenas("shared") <= 2
