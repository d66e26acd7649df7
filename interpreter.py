"""The inside of the sandbox: the warm interpreter, and the processes forked from it, one of which runs the code.

sandbox.py starts this file as a program of its own; nothing else uses it. Two kinds of process come of it:

    _Warm    imports numpy and sympy once, waits, and forks a sandbox whenever the host asks for one
    _State   holds one sandbox's state: waits, forks itself for every candidate; the chosen one goes on as the state

Foreign code runs in a _State and can do with it what it likes: the host trusts nothing that comes from here. What
holds it is set up in _Warm.become_sandbox, before any of it runs.
"""

import ast
import builtins
import contextlib
import ctypes
import errno
import fcntl
import io
import linecache
import math
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import types
import warnings
from pathlib import Path

import contain
import forks
from wire import MESSAGE_LIMIT, Output, cut, pack, parents, receive, send

CHANNEL, SCRATCH = 3, 4  # descriptors in the sandbox
OPEN_FILES = 64
HELLO = pack({"hello": None})  # on Linux, where the kernel names the sender


class _State:
    """A process that holds a sandbox's state: it waits, forks itself for every candidate, and goes on as one."""

    def __init__(self, channel, settings, home, listing=None):
        self.channel, self.settings, self.scratch, self.listing = channel, settings, home, listing
        self.output, self.step_number, self.children, self.final = Output(), 0, {}, None
        self.main = sys.modules["__main__"]  # a new one, as all is in a fork of the warm interpreter
        self.given = {"final_answer": self.final_answer}
        self.given |= {name: self.make_tool(name) for name in settings["tools"]}

    def serve(self):
        while True:
            self.channel.recv(1, socket.MSG_PEEK)  # wait in here, where Python touches next to nothing after a fork
            request, descriptors = receive(self.channel)
            if request is None:
                os._exit(0)
            if "wait" in request:
                _, status = os.waitpid(self.children[request["wait"]], 0)
                send(self.channel, {"status": os.waitstatus_to_exitcode(status)})
                continue
            if "clean" in request:
                send(self.channel, {"clean": self.clean()})
                continue
            candidate = self.fork(request, descriptors)
            del request
            if candidate:
                self.step(*candidate)

    def fork(self, request, descriptors):
        """One child a candidate; some are forked by another, before its code runs (see `parents`).

        Returns None, and in each child its code, its folder's name and where its output goes.
        """
        for name in request["remove"]:
            if not self.scratch.endswith(name):
                _remove(f"{self.settings['scratch']}/{name}")
        self.reap()
        forked_by, index = parents(len(request["codes"])), None
        while index in forked_by:
            own = forked_by.index(index)
            forked_by[own] = -1
            child = forks.fork()
            if child:
                self.children[own] = child
                continue
            index, self.children = own, {}
            if self.listing is not None:  # no candidate can see the others' folders
                os.close(self.listing)
                self.listing = None
            if not self.settings["gated"]:  # a group of its own, to be killed as one
                os.setpgid(0, 0)
            os.dup2(descriptors[2 * index], CHANNEL)
            self.channel.sendall(HELLO if contain.LINUX else pack({"hello": os.getpid()}))
        output = None if index is None else descriptors[2 * index + 1]
        for descriptor in descriptors:
            if descriptor != output:
                os.close(descriptor)
        return None if index is None else (request["codes"][index], request["names"][index], output)

    def clean(self):
        """Remove all that code has left beside this process's own folder. Whether it is gone: a folder may be shut."""
        folder, own = self.settings["scratch"], os.path.basename(self.scratch)
        for name in os.listdir(self.listing):
            if name != own:
                _remove(f"{folder}/{name}")
                with contextlib.suppress(OSError):
                    os.unlink(f"{folder}/{name}")
        return os.listdir(self.listing) == [own]

    def reap(self):
        self.children = {}
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:  # none is left
            pass

    def step(self, code, name, output):
        self.lock, self.final, self.step_number = threading.Lock(), None, self.step_number + 1
        process = os.getpid()
        try:
            os.dup2(output, 1)
            os.dup2(output, 2)
            self.output.attach(1, self.settings["half"])  # the only descriptor that the filter lets map like this
            os.lseek(output, 8 + 8 * self.settings["half"], 0)
            os.close(output)
            self.move_scratch(name)
            sys.stdin = io.StringIO()
            sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = self.output
            vars(self.main).update(self.given)
            contain.hold_limits(True)
            outcome = self.execute(code)
            if os.getpid() != process:  # the code forked, where it can, and this is its child
                os._exit(0)
        except BaseException as error:  # out of memory in the wrong place
            contain.hold_limits(False)
            outcome = {"error": cut(describe(error), 1000), "kind": _kind(error)}
        signal.alarm(0)
        contain.hold_limits(False)
        send(self.channel, {"done": outcome})

    def move_scratch(self, name):
        """Go on in a folder of this candidate's own, with a copy of what is in the state's folder."""
        old, new, place = self.scratch, f"{self.settings['scratch']}/{name}", ""
        with contextlib.suppress(OSError):  # the code may have removed the folder it is in
            place = _getcwd()
        try:
            os.mkdir(new, 0o700)
            if os.path.isdir(old) and os.listdir(old):  # by its name: a descriptor's place is shared by all candidates
                shutil.copytree(old, new, symlinks=True, dirs_exist_ok=True)
                _reopen_files(old, new)
        except OSError:  # no room for a copy: stay in the state's folder
            _remove(new)
            return
        folder = os.open(new, os.O_RDONLY | os.O_DIRECTORY)
        os.dup2(folder, SCRATCH)
        os.close(folder)
        self.scratch = new
        if place == old or place.startswith(old + "/"):
            with contextlib.suppress(OSError):
                os.chdir(new + place[len(old) :])

    def execute(self, code):
        filename = f"<step {self.step_number}>"
        linecache.cache[filename] = (len(code), None, code.splitlines(True), filename)
        linecache.cache.pop(f"<step {self.step_number - 1000}>", None)
        try:
            body, last = _compile(code, filename)
        except Exception as error:
            return {"error": cut(_describe_syntax(error), self.settings["limit"]), "kind": "syntax"}
        try:
            exec(body, vars(self.main))
            value = eval(last, vars(self.main)) if last else None
            return {"result": None if value is None else cut(repr(value), self.settings["limit"])}
        except BaseException as error:
            contain.hold_limits(False)  # there may be no memory left to say so
            if self.final:
                return {}
            note = f"; a step may allocate {self.settings['memory_mb']:,} MB" if _kind(error) == "memory" else ""
            return {"error": cut(describe(error), self.settings["limit"]) + note, "kind": _kind(error)}

    def final_answer(self, answer=None):
        """End the action with this answer: a JSON value, or anything else as its text."""
        value = answer if _is_json(answer) else cut(str(answer), 100_000)
        message = pack({"final": value})
        if len(message) > MESSAGE_LIMIT:
            raise ValueError(f"the final answer is too long: {len(message):,} bytes of at most {MESSAGE_LIMIT:,}")
        with self.lock:
            self.channel.sendall(message)
        self.final = True
        if threading.current_thread() is threading.main_thread():
            # An exception might be swallowed, by a bare `except:` or a callback. So do not go back: wait for the next
            # step right here.
            contain.hold_limits(False)
            send(self.channel, {"done": {}})
            self.serve()
        main = ctypes.c_ulong(threading.main_thread().ident)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(SystemExit))
        raise SystemExit

    def make_tool(self, name):
        def tool(*args, **kwargs):
            try:
                message = pack({"tool": name, "args": args, "kwargs": kwargs})
            except TypeError as error:
                raise TypeError(f"{name}() takes JSON values only: {error}") from None
            if len(message) > MESSAGE_LIMIT:
                raise ValueError(f"the arguments of {name}() are too long")
            with self.lock:
                self.channel.sendall(message)
                reply, _ = receive(self.channel)
            if "error" not in reply:
                return reply["value"]
            kind = getattr(builtins, reply["error"], None)
            if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(kind, UnicodeError):
                kind = RuntimeError
            raise kind(reply["message"])

        tool.__name__ = tool.__qualname__ = name
        tool.__doc__ = self.settings["tools"][name]
        return tool


def _is_json(value):
    """Does it arrive as what it was? Not so a tuple, a dict with numbers as keys, an infinity, a numpy number."""
    if type(value) is list:
        return all(map(_is_json, value))
    if type(value) is dict:
        return all(type(key) is str and _is_json(item) for key, item in value.items())
    return value is None or type(value) in (str, int, bool) or (type(value) is float and math.isfinite(value))


def _compile(code, filename):
    """The code, and its last expression if it ends in one."""
    tree = ast.parse(code, filename)
    last = None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        expression = ast.Expression(tree.body.pop().value)
        last = compile(expression, filename, "eval", dont_inherit=True)
    return compile(tree, filename, "exec", dont_inherit=True), last


def _describe_syntax(error):
    if isinstance(error, SyntaxError) and error.lineno:
        text = (error.text or "").strip()
        return f"{type(error).__name__}: {error.msg} (line {error.lineno}: {text})"
    text = str(error) or "the code is too long or too deeply nested"
    return f"{type(error).__name__}: {text}"


def _kind(error):
    memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    return "memory" if memory else "runtime"


def describe(error):
    """Type, text, and the lines of the code that led there."""
    text = "".join(traceback.format_exception_only(type(error), error)).strip()
    ours = []  # the first and the last frame of the code: what it did in this step, and where that led
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename.startswith("<step "):
            ours[1:] = [(frame.f_code.co_filename, frame.f_code.co_name, number)] if ours else []
            ours = ours or [(frame.f_code.co_filename, frame.f_code.co_name, number)]
    places = []
    for filename, name, number in ours:
        place = f"line {number}: {linecache.getline(filename, number).strip()}"
        if filename != ours[0][0]:
            place = f"{filename[1:-1]}, {place}"
        places.append(place if name == "<module>" else f"in {name}, {place}")
    return f"{text} ({'; '.join(places)})" if places else text


def _reopen_files(old, new):
    """Files that the code holds open go on in the copies, each at its place: a fork alone would share the place."""
    for descriptor in range(SCRATCH + 1, OPEN_FILES):
        try:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if path.startswith(old + "/"):
                flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_APPEND)
                place = os.lseek(descriptor, 0, os.SEEK_CUR)
                copy = os.open(new + path[len(old) :], flags)
                os.lseek(copy, place, os.SEEK_SET)
                os.dup2(copy, descriptor, inheritable=False)
                os.close(copy)
        except OSError:  # not open, or not a file of this folder any more
            pass


_getcwd, _realpath = os.getcwd, os.path.realpath


def _hide_scratch(state, link):
    """Every candidate's folder has another name; the link leads each process to its own. So show the link only."""
    import tempfile

    def shown(path):
        inside = path == state.scratch or path.startswith(state.scratch + "/")
        return link + path[len(state.scratch) :] if inside else path

    os.getcwd = lambda: shown(_getcwd())
    os.getcwdb = lambda: os.fsencode(os.getcwd())
    os.path.realpath = lambda path, **options: (
        shown(_realpath(path, **options)) if isinstance(path, str | os.PathLike) else _realpath(path, **options)
    )
    tempfile.tempdir = link


class _Warm:
    """The warm interpreter: forks a sandbox whenever the host asks, and ends everything when the host is gone."""

    def __init__(self, control):
        self.control = control
        self.settings, _ = receive(control)
        self.contained = self.settings["contained"] and contain.SUPPORTED
        self.missing, self.groups = [], {}
        self.host = os.pidfd_open(os.getppid()) if contain.LINUX else None
        devices = [f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom")]
        self.devices = list(filter(os.path.exists, devices))
        sys.path[:] = self.settings["path"]
        os.environ.clear()

    def attempt(self, name, function, *arguments):
        """Set up one layer; where it cannot be had, note why and go on without it."""
        try:
            return function(*arguments) or True
        except OSError as error:
            self.missing.append(f"{name} ({error.strerror or error})")
            return None

    def prepare(self):
        separate = self.contained and self.attempt("namespaces", contain.enter_namespaces)
        if contain.LINUX:
            contain.adopt_orphans()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for what ends here
        _import_quietly()
        self.libraries = _library_paths(sys.path)
        self.folder, links = "/scratch", ("/work", "/sandbox")
        self.link = separate and self.attempt(
            "file tree", contain.build_root, self.libraries + self.devices, self.folder, links, SCRATCH
        )
        self.rooted = bool(self.link)
        if not self.rooted:
            import tempfile

            self.folder = os.path.realpath(tempfile.mkdtemp(prefix="sandbox-"))
            os.chmod(self.folder, 0o711)
            self.link = self.folder + "/tmp"
            os.symlink(f"/proc/self/fd/{SCRATCH}", self.link)
        for name in ("contain", "forks", "wire", "__mp_main__"):
            sys.modules.pop(name, None)
        sys._clear_type_cache()  # it is written anew, and would take names of attributes from old pages
        _rehearse()
        self.taken = forks.use_new_pages()
        sys.modules["__main__"] = types.ModuleType("__main__")
        forks.settle()

    def serve(self):
        send(self.control, {"missing": self.missing})
        os.dup2(0, 2)  # /dev/null: what went wrong until now was the host's to read
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        if self.host is not None:
            poll.register(self.host, select.POLLIN)
        while True:
            if self.host in dict(poll.poll()):
                return
            request, descriptors = receive(self.control)
            if request is None:
                return
            if "close" in request:
                self.end(request["close"])
                continue
            child = forks.fork()
            if child == 0:
                os.setpgid(0, 0)
                self.become_sandbox(request, descriptors[0])
            self.groups[request["id"]] = child
            os.close(descriptors[0])

    def end(self, name):
        group = self.groups.pop(name, None)
        if group:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
        if not self.rooted:
            _remove_closed(f"{self.folder}/{name}")

    def end_all(self):
        for name in list(self.groups):
            self.end(name)
        with contextlib.suppress(OSError):  # whoever is left: orphans come to us
            while children := Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                for child in children:
                    os.kill(int(child), signal.SIGKILL)
                time.sleep(0.001)
        if not self.rooted:
            _remove_closed(self.folder)

    def become_sandbox(self, request, channel):
        try:
            self.set_up(request, channel)
        except Exception as error:
            send(socket.socket(fileno=CHANNEL), {"failed": describe(error)})
            os._exit(1)

    def set_up(self, request, channel):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(channel, CHANNEL, inheritable=False)
        scratch = f"{self.folder}/{request['id']}"
        if self.rooted:
            contain.mount_scratch(self.folder, request["scratch_mb"])
        os.mkdir(scratch, 0o700)
        home = f"{scratch}/{request['name']}"
        os.mkdir(home, 0o700)
        os.dup2(os.open(home, os.O_RDONLY | os.O_DIRECTORY), SCRATCH)
        os.closerange(SCRATCH + 1, 1024)
        os.chdir(home)
        # The host weighs what is in the folder where no tmpfs does.
        folder = None if self.rooted else os.open(scratch, os.O_RDONLY | os.O_DIRECTORY)
        listing = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY)
        memory = contain.address_space() + (request["memory_mb"] << 20)
        gate = self.contain(scratch, home)
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, CHANNEL)
        state = _State(channel, request | {"scratch": scratch, "gated": gate is not None}, home, listing)
        if contain.LINUX:
            _hide_scratch(state, self.link)
        sys.argv = [""]
        descriptors = [descriptor for descriptor in (gate, folder) if descriptor is not None]
        hello = {"gate": gate is not None, "folder": folder is not None, "missing": self.missing}
        send(channel, {"hello": os.getpid()} | hello, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        limits = {"cpu_seconds": math.ceil(request["timeout"]) + 1, "file_size": request["scratch_mb"] << 20}
        contain.set_limits(memory, **limits, open_files=OPEN_FILES, processes=None if gate is not None else 4096)
        state.serve()

    def contain(self, scratch, home):
        os.chmod(scratch, 0o300)  # a candidate cannot find the others' folders: names are drawn at random
        if self.contained:
            user = contain.unprivileged_user(self.libraries)
            for folder in [scratch, home] + [self.folder] * self.rooted:
                os.chown(folder, user, -1)
            contain.drop_privileges(user)
        if not self.contained:
            return None
        self.attempt("Landlock", contain.restrict_files, self.libraries, [scratch], self.devices)
        gate = self.attempt("seccomp", contain.filter_system_calls)
        if gate is True:
            self.missing.append("gate (another one is in its way)")
        return None if gate is True else gate


def _remove(folder):
    try:
        os.rmdir(folder)  # most are empty, and rmtree is slow
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_closed(folder):
    """Remove a folder that the code may have closed to us."""
    folders = [folder]
    while folders:
        path = folders.pop()
        with contextlib.suppress(OSError):
            os.chmod(path, 0o700)
            folders += [entry.path for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False)]
    shutil.rmtree(folder, ignore_errors=True)


def _library_paths(path):
    """The interpreter's own: its modules, and the folders of the shared libraries it has loaded."""
    folders = set(path)
    if contain.LINUX:
        with open("/proc/self/maps") as maps:
            files = {line.split(maxsplit=5)[5].strip() for line in maps if ".so" in line}
        folders |= {os.path.dirname(file) for file in files if os.path.exists(file)}
    return sorted(folder for folder in folders if os.path.isdir(folder))


def _import_quietly():
    """Import what code for math and facts needs, with the same random state in every sandbox.

    random would reseed itself after every fork: the state of a step must be the state of the step before.
    """
    register, os.register_at_fork = os.register_at_fork, lambda **hooks: None
    import random

    os.register_at_fork = register
    import datetime
    import statistics
    import tempfile

    import numpy
    import sympy

    warnings.simplefilter("ignore", SyntaxWarning)  # of a step's own text: it runs all the same
    random.seed(0)
    numpy.random.seed(0)
    sys.set_int_max_str_digits(0)
    return datetime, statistics, tempfile, sympy


def _rehearse():
    """Go through what a step does, so that what Python writes down the first times is in no child's way."""
    state = _State(None, {"tools": [], "limit": 100}, "")
    state.main = types.ModuleType("__main__")
    for _ in range(20):
        for code in ("x = [1]\nfor i in x: print(i)\nx", "1 / 0", "1 +"):
            pack(state.execute(code))
    os.dup2(0, 0, inheritable=True)  # a function's first call with a keyword
    linecache.cache.clear()


def _main(descriptor):
    warm = _Warm(socket.socket(fileno=descriptor))
    warm.prepare()
    try:
        warm.serve()
    finally:
        warm.end_all()
        os._exit(0)


if __name__ == "__main__":
    _main(int(sys.argv[1]))
