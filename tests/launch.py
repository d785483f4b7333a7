"""
Run a script of ours as its own process, without paying for `import torch` each time.

A server that has imported everything is forked for each process (multiprocessing's forkserver); the child has
the arguments, streams, working directory and exit code that a shell would give it. Several ranks are started
as torchrun does it.
"""
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "numpy", "launch", "common.run", "common.losses",
                                    "common.rewards", "extras.images"])
    return context


def _child(args, environment, cwd, folder):
    """In the new process: become `python *args`, where args[0] is a script or "-m"."""
    os.environ.update(environment)
    os.chdir(cwd)
    os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.dup2(os.open(os.path.join(folder, "stdin"), os.O_RDONLY | os.O_CREAT), 0)
    sys.stdout, sys.stderr, sys.stdin = open(1, "w"), open(2, "w"), open(0)
    is_module = args[0] == "-m"
    sys.argv, sys.path[0] = list(args[is_module:]), os.path.dirname(os.path.abspath(args[0]))
    code = 0
    try:
        try:
            if is_module:
                runpy.run_module(args[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(args[0], run_name="__main__")
        except SystemExit:
            raise
        except BaseException:                                 # as the interpreter does at top level
            code = 1
            sys.excepthook(*sys.exc_info())
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(args, folder, ranks=1, cwd=ROOT):
    """-> a process of `python *args` for each rank; all read folder/stdin, write folder/stdout and /stderr"""
    args, port, processes = [str(arg) for arg in args], _free_port(), []
    os.environ["OMP_NUM_THREADS"] = "1"                       # for the server, which is started by the first
    for rank in range(ranks):
        environment = {} if ranks == 1 else {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        process = _context().Process(target=_child, args=(args, environment, str(cwd), str(folder)))
        process.start()
        processes.append(process)
    return processes


def launch(args, ranks=1, cwd=ROOT, timeout=300, input=""):
    """-> subprocess.CompletedProcess of `python *args`, or of torchrun with that many ranks"""
    args = [str(arg) for arg in args]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "stdin").write_text(input)
        processes = start(args, folder, ranks, cwd)
        deadline = time.time() + timeout
        while any(p.exitcode is None for p in processes) and time.time() < deadline \
                and not any(p.exitcode for p in processes):
            multiprocessing.connection.wait([p.sentinel for p in processes if p.exitcode is None], timeout=1)
        others = [p.sentinel for p in processes if p.exitcode is None]
        if others and any(p.exitcode for p in processes):     # one has failed: give the others a moment
            multiprocessing.connection.wait(others, timeout=2)                    # of none it would wait, too
        late = time.time() >= deadline
        for process in processes:
            if process.exitcode is None:
                process.kill()
            process.join()
        out, err = ((Path(folder) / name).read_text() if (Path(folder) / name).exists() else ""
                    for name in ("stdout", "stderr"))
        if late:
            raise subprocess.TimeoutExpired(args, timeout, out, err)
        code = next((p.exitcode for p in processes if p.exitcode), 0)
        return subprocess.CompletedProcess(args, code, out, err)


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
