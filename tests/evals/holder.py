"""What processes of their own run in the tests of the queue, and the service as such a process."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil

from evals.queue import Queue

ROOT = Path(__file__).resolve().parents[2]


def hold_one_job(database):
    """Lease a job for a second and do nothing with it."""
    Queue(database).lease("holder", seconds=1.0)
    time.sleep(60)


def request(address, method, path, body=None, headers=None):
    """Status, headers and text of one request on a connection of its own."""
    connection = http.client.HTTPConnection(*address, timeout=60)
    try:
        data = None if body is None else json.dumps(body)
        given = {"Content-Type": "application/json", **(headers or {})}
        connection.request(method, path, body=data, headers=given)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        connection.close()


class Service:
    """`trellis eval-service` as a process; a context that ends it."""

    def __init__(self, *arguments, **environment):
        command = [sys.executable, "-m", "launch.cli", "eval-service", *map(str, arguments), "--port", "0"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
        )
        match = re.match(r"http://(\S+):(\d+)/ ", self.process.stdout.readline())
        assert match, "the service did not start"
        self.address = match[1], int(match[2])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(30)
        self.process.stdout.close()

    def ask(self, method, path, body=None):
        """The parsed answer of a request that must not be refused."""
        status, _, text = request(self.address, method, path, body)
        assert status < 300, f"{method} {path}: {status} {text}"
        return json.loads(text)

    def workers(self):
        """Its worker processes."""
        found = psutil.Process(self.process.pid).children()
        return [child for child in found if "spawn_main" in " ".join(child.cmdline())]

    def wait_for(self, condition, *, seconds=120):
        """The first true value of condition(jobs), looked for often."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            jobs = self.ask("GET", "/jobs")["jobs"]
            if value := condition(jobs):
                return value
            time.sleep(0.03)
        raise AssertionError(f"waited for {seconds} s in vain: {jobs}")
