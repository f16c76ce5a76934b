"""Run a function in a process of its own: with its own threads, caches and memory."""

from __future__ import annotations

import ast
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from mctf_compile.errors import MctfError

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def run_in_process(
    function: str,
    arguments: Mapping[str, Any],
    threads: int,
    cache: str | Path,
    progress: Callable[[str, int, int], None] | None = None,
) -> Any:
    """Call a function in a new process and return what it returns.

    Args:
        function: ``module:name``; called with the arguments and ``progress``, returns plain values for JSON.
        arguments: Python literals.
        threads: of the CPU, set before torch is loaded.
        cache: folder of Inductor's caches.
        progress: told what the function tells its own.

    Raises:
        MctfError: the function raised, with its error in one line. Whatever ends this function ends the process.
    """
    environment = {
        **os.environ,
        **dict.fromkeys(THREADS, str(threads)),
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    # In a session of its own Ctrl-C reaches this process alone, which then ends the other with all that it started.
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "mctf_compile.measuring.subprocesses", function],
            env=environment,
            text=True,
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        ) as process,
    ):
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(repr(dict(arguments)))
            process.stdin.close()
            answer = _follow(process.stdout, progress)
            process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        if "result" in answer:
            return answer["result"]
        errors.seek(0)
        last = next((line for line in reversed(errors.read().splitlines()) if line.strip()), "no message")
        raise MctfError(answer.get("error", f"a process of {function} ended with status {process.returncode}: {last}"))


def _follow(lines: IO[str], progress: Callable[[str, int, int], None] | None) -> dict[str, Any]:
    """Pass on the progress that is read; returns the last line, which has the result or the error."""
    answer: dict[str, Any] = {}
    for line in lines:
        answer = json.loads(line)
        if "progress" in answer and progress is not None:
            progress(*answer["progress"])
    return answer


def main() -> None:
    """The other side: the name of the function is the argument, its own arguments come on stdin."""
    # What libraries print goes to stderr.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as channel:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

        def tell(**line: Any) -> None:
            print(json.dumps(line), file=channel, flush=True)

        module, _, name = sys.argv[1].partition(":")
        arguments = ast.literal_eval(sys.stdin.read())
        try:
            function = getattr(importlib.import_module(module), name)
            tell(result=function(**arguments, progress=lambda *step: tell(progress=step)))
        except Exception as error:
            message = next(iter(str(error).strip().splitlines()), "")
            tell(error=message if isinstance(error, MctfError) else f"{type(error).__name__}: {message}")


if __name__ == "__main__":
    main()
