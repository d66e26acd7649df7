"""HTTP servers for the tests: one whose answers and faults are decided by a function, and programs in own processes."""

import contextlib
import http.server
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time

import requests


def completion(text, **more):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", **more}
    return {"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}


@contextlib.contextmanager
def background(server):
    """Run a server of this process in a thread. Yields its address."""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def serve(behave, model="served-name"):
    """behave(path, body, request number) returns a dict (answered as JSON), or a tuple that names a fault:

    ("status", code, headers, text), ("reset",), ("reset in body",), ("cut",), ("raw", bytes),
    ("hang", seconds). Yields the base URL and the list of requests seen.
    """
    seen, lock = [], threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *args):
            pass

        def do_GET(self):
            self.answer(model if isinstance(model, list) else {"data": [{"id": model}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append((self.path, body, dict(self.headers)))
                number = len(seen) - 1
            self.answer(behave(self.path, body, number))

        def answer(self, answer):
            kind, *details = answer if isinstance(answer, tuple) else ("raw", json.dumps(answer).encode())
            if kind == "raw":
                return self.send(200, {}, details[0])
            if kind == "status":
                return self.send(details[0], details[1], details[2].encode())
            if kind == "hang":
                time.sleep(details[0])
                return self.send(200, {}, b"{}")
            self.close_connection = True
            if kind != "reset":  # the body is shorter than announced
                self.send_response(200)
                self.send_header("Content-Length", "500")
                self.end_headers()
                self.wfile.write(b'{"choices": [{"mess')
                self.wfile.flush()
            if kind != "cut":
                self.reset()

        def send(self, status, headers, content):
            with contextlib.suppress(OSError):  # a client that gave up is part of the tests
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def reset(self):
            """Close with a TCP reset, as a crashing server or a dropped route does."""
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request, client_address):
            if not isinstance(sys.exception(), OSError):  # a fault of the test's own behaviour must be seen
                super().handle_error(request, client_address)

    with background(Server(("127.0.0.1", 0), Handler)) as address:
        yield f"{address}/v1", seen


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def running(command, port, log, **environment):
    """Run a server's command until /health answers. Yields its base URL; then the process is killed."""
    with open(log, "ab") as file:
        command = [*command, "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | environment)
    try:
        deadline = time.monotonic() + 180
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def answers(url):
    try:
        return requests.get(url, timeout=5).ok
    except requests.ConnectionError:
        return False
