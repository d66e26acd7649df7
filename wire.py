"""What crosses between the host and a sandbox: messages in JSON over a socket, and printed text in shared memory.

Both sides use it (sandbox.py and interpreter.py). The host trusts nothing that it reads: `read_output` here, and
`_parse` in sandbox.py, take any bytes.
"""

import errno
import io
import json
import mmap
import os
import socket
import struct
import threading
import time

MESSAGE_LIMIT = 8 << 20  # bytes of one message: code, a tool's arguments, a final answer
RAW_OUTPUT = 16 << 10  # bytes kept of what is written to descriptors 1 and 2 around sys.stdout


def cut(text, limit):
    """The text, or its two ends with a note between them."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}{note(len(text) - 2 * half)}{text[len(text) - half :]}"


def note(missing):
    return f"\n[... {missing:,} characters not shown ...]\n"


def parents(count):
    """Who forks each of `count` candidates: None for the state, or an earlier candidate, before its own code runs.

    Processors share the work, as a fork takes as long as a short step: of what a process has to fork, its first child
    takes half, forks the others of that half, and so on.
    """
    forked_by = {}

    def spread(indices, parent):
        while indices:
            half = max(1, len(indices) // 2)
            forked_by[indices[0]] = parent
            spread(indices[1:half], indices[0])
            indices = indices[half:]

    spread(range(count), None)
    return [forked_by[index] for index in range(count)]


# Messages: four bytes of length, then JSON.


def pack(message):
    data = json.dumps(message).encode()
    return len(data).to_bytes(4, "big") + data


def send(channel, message, descriptors=()):
    data = pack(message)
    while descriptors:
        try:
            data = data[socket.send_fds(channel, [data], descriptors) :]
            break
        except OSError as error:  # the kernel bounds a user's descriptors on their way: others will have arrived soon
            if error.errno != errno.ETOOMANYREFS:
                raise
            time.sleep(0.001)
    channel.sendall(data)


def receive(channel):
    """(message, descriptors), or (None, []) when the other side has gone. Blocks."""
    header, descriptors, _, _ = socket.recv_fds(channel, 4, 253)
    data = bytearray()
    while header and len(header) < 4:
        header += channel.recv(4 - len(header))
    if not header:
        return None, []
    length = int.from_bytes(header, "big")
    while len(data) < length:
        chunk = channel.recv(min(length - len(data), 1 << 20))
        if not chunk:
            return None, []
        data += chunk
    return json.loads(data.decode()), descriptors


class Output(io.TextIOBase):
    """sys.stdout: the first and the last characters stay in memory that the host reads; the others are counted.

    So no amount of printing costs the host anything, and a kill loses nothing. The memory holds the number of
    characters (8 bytes), the first `half`, a ring of the last `half` (UTF-32), and what was written to descriptors
    1 and 2 directly.
    """

    encoding = "utf-8"

    def attach(self, descriptor, half):
        if getattr(self, "memory", None):
            self.memory.close()
        self.memory, self.half, self.count, self.lock = mmap.mmap(descriptor, 0), half, 0, threading.Lock()

    def writable(self):
        return True

    @property
    def buffer(self):
        raw = io.BytesIO()
        raw.write = lambda data: self.write(bytes(data).decode("utf-8", "replace"))
        return raw

    def write(self, text):
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        with self.lock:
            count, half, memory = self.count, self.half, self.memory
            head = text[: max(0, half - count)]
            if head:
                memory[8 + 4 * count : 8 + 4 * (count + len(head))] = head.encode("utf-32-le", "surrogatepass")
            start = max(len(head), len(text) - half)
            tail = text[start:].encode("utf-32-le", "surrogatepass")
            if tail:
                ring, place = 8 + 4 * half, 4 * ((count + start - half) % half)
                first = tail[: 4 * half - place]
                memory[ring + place : ring + place + len(first)] = first
                memory[ring : ring + len(tail) - len(first)] = tail[len(first) :]
            self.count = count + len(text)
            memory[:8] = struct.pack("=Q", self.count)
        return len(text)


def read_output(descriptor, half):
    """The host's side of Output; nothing in the memory is trusted."""
    count = min(struct.unpack("=Q", os.pread(descriptor, 8, 0))[0], 1 << 60)
    size = 4 * min(count, 2 * half)
    text = os.pread(descriptor, size, 8).decode("utf-32-le", "replace")
    if count > 2 * half:
        place = (count - half) % half
        head, ring = text[:half], text[half:]
        text = head + note(count - 2 * half) + ring[place:] + ring[:place]
    raw = os.pread(descriptor, RAW_OUTPUT, 8 + 8 * half)
    raw = b"" if raw == bytes(len(raw)) else raw.rstrip(b"\0")  # which is slow, and most often there is nothing
    return text.encode("utf-8", "replace").decode() + raw.decode("utf-8", "replace")
