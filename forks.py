"""Cheap forks of a large interpreter: what its children will write to is parted from what they will not.

    taken = use_new_pages()     # for new objects, once everything is imported
    settle()                    # the old ones become huge
    fork()

fork(2) copies page tables, and what a child or its parent writes to afterwards is copied page by page. Both are cheap
as long as most of the memory is in 2 MiB pages that nobody writes to; one written byte makes 512 small ones of such a
page. A child writes where new objects go, and to the counts of references of old ones. With numpy and sympy imported,
a fork and its end take 1.7 ms without this file, and 0.8 with it.
"""

import _thread
import bisect
import contextlib
import ctypes
import gc
import os
import sys
from pathlib import Path

from contain import LINUX, check, libc

_python = ctypes.PyDLL(None, use_errno=True)  # calls keep Python's lock


def fork():
    """fork(2). Python's own also mends what threads leave behind, for which it touches, and so copies, many pages."""
    if _thread._count():
        return os.fork()
    child = _python.fork()
    if child < 0:
        raise OSError(ctypes.get_errno(), "no fork")
    return child


def _own_memory():
    """[(start, end, is it the heap?)] of this process's anonymous memory."""
    areas = []
    for line in Path("/proc/self/maps").read_text().splitlines() if LINUX else []:
        fields = line.split()
        if fields[1] == "rw-p" and fields[4] == "0" and (len(fields) == 5 or fields[5] == "[heap]"):
            start, end = (int(side, 16) for side in fields[0].split("-"))
            areas.append((start, end, len(fields) > 5))
    return areas


def use_new_pages():
    """From here on, new objects go to new pages: the free places between the old ones are taken for good.

    Returns what keeps them taken. Python's own allocator has places of 16 to 512 bytes: bytes fit into most, a complex
    number takes 32, an object 16.
    """
    edges = [edge for start, end, _ in _own_memory() for edge in (start, end)]
    taken = [edges]
    gc.collect()  # empties the lists of freed objects that Python keeps for reuse
    for size in range(512, 0, -16):
        for _ in range(1 << 16):  # at most: another allocator may have mapped more than it will ever fill
            taken.append(bytes(size - sys.getsizeof(b"")) if size > 33 else 1j * size if size > 16 else object())
            if bisect.bisect(edges, id(taken[-1])) % 2 == 0:
                break
    _fill_heap()
    return taken


def _fill_heap():
    """The same for glibc's allocator, whose places are of any size."""
    if hasattr(libc, "malloc_trim"):
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.argtypes = [ctypes.c_void_p]
        libc.malloc_trim(0)
        top = max((end for _, end, heap in _own_memory() if heap), default=0) - 4096
        for size in range(1 << 16, 0, -16):
            while (place := libc.malloc(size)) < top:
                pass
            libc.free(place)


def settle():
    """Put what there is where it costs a fork least. Where the kernel cannot do that, nothing happens."""
    gc.freeze()  # a collection in a child would touch, and so copy, every page
    _collapse()
    with contextlib.suppress(OSError):
        _share_library_data()


def _collapse():
    """Put this process's anonymous memory on huge pages (MADV_COLLAPSE, Linux 6.1)."""
    huge = 2 << 20
    for start, end, _ in _own_memory():
        for address in range(-(-start // huge) * huge, end // huge * huge, huge):
            libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(huge), 25)


def _share_library_data():
    """Map the libraries' own data anew, from a file in memory that holds what is in it now.

    Of every mapping that was ever written to, the kernel keeps its ancestors' list and copies the page tables at each
    fork. Loading a library writes to its data, so there are over a hundred; hardly any is written to again.
    """
    changing = ("libpython", "libc.", "libc-", "ld-", "_ctypes", "libffi")  # while this runs; but not read-only parts
    parts = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if "-" in fields[0]:
            start, end = (int(side, 16) for side in fields[0].split("-"))
            rights, name = fields[1], os.path.basename(fields[5]) if len(fields) > 5 else ""
        elif fields[0] == "Anonymous:" and fields[1] != "0" and ".so" in name:
            if rights == "r--p" or (rights == "rw-p" and not name.startswith(changing)):
                parts.append((start, end - start, 3 if "w" in rights else 1))
    libc.mmap.restype, size = ctypes.c_void_p, ctypes.c_size_t
    file = os.memfd_create("libraries", os.MFD_CLOEXEC)
    for start, length, protection in parts:
        offset = os.lseek(file, 0, os.SEEK_END)
        os.write(file, ctypes.string_at(start, length))
        place = libc.mmap(size(start), size(length), protection, 0x12, file, size(offset))  # MAP_PRIVATE, MAP_FIXED
        check(0 if place == start else -1, "mmap")
    os.close(file)
