"""Processes that start with torch and this package imported already: each costs a fork, not seconds of imports.

They fork from a server that has computed nothing, for the threads of autograd cannot be forked. With torch 2.10 that is
not enough, so there each starts from nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import uuid
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

import torch

FORKS = torch.__version__ >= "2.11"
PRELOADED = ["condconv_surgery.cli.finetune", "matplotlib.pyplot", "tests.small_run", "tests.small_study"]


def forked(function: Callable[..., int], *arguments: object, output: Path) -> BaseProcess:
    """Start ``function`` in a process that ends with its exit code and writes what it prints into ``output``."""
    context = multiprocessing.get_context("forkserver" if FORKS else "spawn")
    if FORKS:
        context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_whole_process, args=(function, arguments, output))
    process.start()
    return process


def fresh_python(code: str, *arguments: object, folder: Path) -> CompletedProcess[str]:
    """``python -c code arguments`` in ``folder``: a process that has only the modules in common with this one."""
    with TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        process = forked(_execute, code, [*map(str, arguments)], folder, err, output=out)
        process.join(300)
        if process.is_alive():
            process.kill()
            process.join()
        assert process.exitcode is not None
        return CompletedProcess([code, *arguments], process.exitcode, out.read_text(), err.read_text())


def fresh_command(*arguments: object, folder: Path) -> CompletedProcess[str]:
    """``condconv arguments`` in ``folder``."""
    return fresh_python("from condconv_surgery.cli.main import run; run()", *arguments, folder=folder)


def fresh_script(script: Path, *arguments: object, folder: Path) -> CompletedProcess[str]:
    """``python script arguments`` in ``folder``."""
    code = f"import runpy; sys.argv[0] = {str(script)!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    return fresh_python(f"import sys; sys.path[0] = {str(script.parent)!r}; {code}", *arguments, folder=folder)


def several(function: Callable[..., int], processes: int, restarts: int, *arguments: object) -> int:
    """``function`` in processes of one group, by the agent of ``torchrun``; to be given to ``forked``."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        start_method="fork" if FORKS else "spawn",
    )
    codes = elastic_launch(config, _in_group)(function, *arguments)
    return max(codes.values())


def _in_group(function: Callable[..., int], *arguments: object) -> int:
    """In each process of the group. A fork leaves torch's thread pool broken. Here one thread makes it anew; those of
    autograd would all do it at once, and abort."""
    torch.set_num_threads(1)
    return function(*arguments)


def command_line(arguments: list[str], number: int) -> int:
    """``condconv`` as a terminal starts it, in a group of its own, where the signal ``number`` is not ignored."""
    from condconv_surgery.cli.main import run

    os.setsid()
    signal.signal(number, signal.SIG_DFL)  # nohup, under which tests may run, ignores SIGHUP
    sys.argv = ["condconv", *arguments]
    run()
    return 0


def _whole_process(function: Callable[..., int], arguments: tuple[object, ...], output: Path) -> None:
    """Everything that the process does."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which tests may run, ignores it
    multiprocessing.set_start_method(None, force=True)  # processes that read images start as in a new program
    torch.set_num_threads(1)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.exit(function(*arguments))


def _execute(code: str, arguments: list[str], folder: Path, errors: Path) -> int:
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT, 0o600), 2)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.chdir(folder)
    sys.path.insert(0, "")
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    return 0
