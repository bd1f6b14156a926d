"""Run programs as ``python`` and ``torchrun`` do, in processes forked from one that has their imports."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import runpy
import socket
import socketserver
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from megatron_slm.testing.ranks import fork_server, reserved_port


class Program(NamedTuple):
    """Arguments of ``python``, its environment and directory, and the number of ranks that ``torchrun`` starts."""

    arguments: list[str]
    environment: dict[str, str]
    directory: str
    ranks: int = 0  # without torchrun


@contextmanager
def program_server() -> Iterator[str]:
    """Yield the address of a socket that runs programs.

    A client sends the fields of :class:`Program` as JSON together with its standard output and error, and receives the
    exit code as one byte.
    """
    with tempfile.TemporaryDirectory() as directory:  # the address has at most 108 bytes
        context = fork_server()
        ready, server_ready = context.Pipe(duplex=False)
        server = context.Process(target=_serve, args=(address := f"{directory}/socket", server_ready))
        server.start()
        server_ready.close()
        try:
            ready.recv()
            yield address
        finally:
            server.terminate()
            server.join()


def run_program(arguments: list[str]) -> None:
    """Run a script, or the module after ``-m``, in this process as ``python`` does."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


def _serve(address: str, ready: Connection) -> None:
    with _Server(address, _Handler) as server:
        ready.send(True)
        server.serve_forever()


class _Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    """Server with one process per request."""

    socket_type = socket.SOCK_SEQPACKET  # a message arrives undivided


class _Handler(socketserver.BaseRequestHandler):
    """Runs one program with the client's output streams, and sends its exit code."""

    def handle(self) -> None:
        message, streams, _, _ = socket.recv_fds(self.request, 1 << 20, 2)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(streams[number - 1], number)
            file = io.BufferedWriter(io.FileIO(number, "w", closefd=False))  # the server's has the position of its file
            setattr(sys, name, io.TextIOWrapper(file, "utf-8", "backslashreplace", line_buffering=True))
        self.request.sendall(bytes([_exit_code(Program(*json.loads(message)))]))


def _exit_code(program: Program) -> int:
    context = multiprocessing.get_context("fork")
    with reserved_port() as port:
        job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(program.ranks)}
        ranks = [{**job, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(program.ranks)]
        processes = [context.Process(target=_start, args=(program, variables)) for variables in ranks or [{}]]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    return max(abs(process.exitcode or 0) for process in processes)


def _start(program: Program, variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ |= program.environment | variables
    os.chdir(program.directory)
    run_program(program.arguments)
