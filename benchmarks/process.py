"""An engine of the benchmark in a process of its own, which never outlives bench.py.

Knows pipes and signals. Does not know what an engine computes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ENGINES = Path(__file__).with_name("engines.py")
# Waits until its standard input ends, then kills the process group in its argument.
GUARD = 'read -r line; kill -s KILL -- "-$1"'


class Engine:
    """One engine process. It computes during `run`, and is stopped at all other times.

    The engine and its children are one process group. SIGSTOP and SIGCONT go to the whole
    group, so that an idle engine takes no time from the engine that is measured.

    The engine ends with bench.py, however bench.py ends. A guard process holds the read
    end of a pipe, and only bench.py holds the write end. The kernel closes the write end
    when bench.py dies, by SIGKILL too. The guard then kills the group with SIGKILL, which
    also ends stopped processes.
    """

    def __init__(self, name: str, python: str, job: dict[str, Any], env: dict[str, str]) -> None:
        """Starts the engine `name` with the interpreter `python`, up to its first token.

        `job` is the first message to benchmarks/engines.py. `env` is added to our
        environment. Raises RuntimeError with the end of the log when the engine ends.
        """
        self.name = name
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        launched = time.time()
        self.process = subprocess.Popen(
            [python, str(ENGINES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **env},
            start_new_session=True,
        )
        self.guard: subprocess.Popen[bytes] | None = None
        try:
            # Until it is asked, an engine only reads its input and ends with it.
            self.guard = subprocess.Popen(
                ["sh", "-c", GUARD, "guard", str(self.process.pid)],
                stdin=subprocess.PIPE,
                start_new_session=True,
            )
            self.startup = self.ask({"engine": name, **job})["first_token_at"] - launched
        except BaseException:
            self.close()
            raise
        self.pause()

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Sends one message and waits for its answer.

        Raises RuntimeError when the engine ends.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.process.wait()
            self.log.seek(0)
            raise RuntimeError(f"{self.name} failed:\n{self.log.read()[-3000:]}")
        return json.loads(answer)

    def run(
        self, prompts: list[list[int]], outputs: list[int], profile: bool = False
    ) -> dict[str, Any]:
        """Generates outputs[i] tokens after prompts[i].

        Returns the answer of benchmarks/engines.py.
        """
        self.send(signal.SIGCONT)
        try:
            return self.ask({"prompts": prompts, "outputs": outputs, "profile": profile})
        finally:
            self.pause()

    def pause(self) -> None:
        self.send(signal.SIGSTOP)

    def close(self) -> None:
        """Kills the engine with its children, and its guard.

        A second call does nothing.
        """
        self.send(signal.SIGKILL)
        self.process.wait()
        if self.guard is not None:
            self.guard.kill()
            self.guard.wait()

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def exit_on_signals() -> None:
    """Makes SIGTERM and SIGHUP raise SystemExit, as SIGINT raises KeyboardInterrupt.

    `finally` clauses then run: they end the engines and delete temporary files. A signal
    that is ignored stays ignored, because nohup ignores SIGHUP.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
