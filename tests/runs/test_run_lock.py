"""One run at a time in a folder."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
from pathlib import Path

import pytest

from condconv_surgery.errors import InputError
from condconv_surgery.training import finetune
from condconv_surgery.training.state.run_lock import LOCK, SILENT, RunLock
from tests.images import write_images
from tests.small_networks import small_net
from tests.training.forked import forked
from tests.training.test_explained_errors import AtStep
from tests.training.test_training_run import options_for


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "data", each=7)


def owner(pid: int, host: str) -> str:
    return json.dumps({"pid": pid, "host": host, "since": ""})


def test_a_second_run_in_the_folder_is_refused(folder: Path) -> None:
    """Between two steps of the first: the second neither writes nor breaks anything."""
    options = options_for(folder, epochs=1)
    refused = []

    def second() -> None:
        with pytest.raises(InputError, match=rf"process {os.getpid()} on {socket.gethostname()} writes into") as caught:
            finetune(small_net(), options)
        refused.append(caught.value.fix)

    finetune(small_net(), options, callback=AtStep(2, second))
    assert refused == ['another output="RUN"; or wait until it has ended, then resume=True']
    assert not (Path(options.output) / LOCK).exists()


def lock_for_ever(folder: Path) -> int:
    lock = RunLock(folder)
    lock.acquire()
    sys.stdout.write("locked")
    sys.stdout.flush()
    time.sleep(600)
    return 0


def test_the_lock_of_another_process_is_seen_and_freed_by_its_death(tmp_path: Path) -> None:
    folder, output = tmp_path / "run", tmp_path / "output"
    folder.mkdir()
    other = forked(lock_for_ever, folder, output=output)
    try:
        while other.is_alive() and not (output.exists() and output.read_text() == "locked"):
            time.sleep(0.01)
        with pytest.raises(InputError, match=f"The run of process {other.pid} on .* writes into"):
            RunLock(folder).acquire()
    finally:
        other.kill()
        other.join()
    lock = RunLock(folder)
    assert f"process {other.pid} on {socket.gethostname()} ended without freeing" in lock.acquire()
    lock.release()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("silence", "is_alive"), [(SILENT / 2, True), (2 * SILENT, False)])
def test_a_run_of_another_host_counts_as_ended_when_it_is_silent(
    tmp_path: Path, silence: float, is_alive: bool
) -> None:
    (tmp_path / LOCK).write_text(owner(7, "elsewhere"))
    at = time.time() - silence
    os.utime(tmp_path / LOCK, (at, at))
    lock = RunLock(tmp_path)
    if is_alive:
        with pytest.raises(InputError, match=r"process 7 on elsewhere writes into(.|\n)*after 120 seconds of silence"):
            lock.acquire()
    else:
        assert "process 7 on elsewhere ended without freeing" in lock.acquire()
        lock.release()


def test_a_beat_keeps_the_lock_alive_for_other_hosts(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    os.utime(tmp_path / LOCK, (1, 1))
    lock.beat()  # too early
    assert (tmp_path / LOCK).stat().st_mtime == 1
    lock.beaten -= 60
    lock.beat()
    assert time.time() - (tmp_path / LOCK).stat().st_mtime < 60
    lock.release()


def test_a_stale_lock_is_noted(folder: Path) -> None:
    options = options_for(folder, epochs=1)
    Path(options.output).mkdir()
    (Path(options.output) / LOCK).write_text(owner(99999999, socket.gethostname()))
    callback = AtStep(-1, list)
    assert finetune(small_net(), options, callback=callback).epochs == 1
    assert "process 99999999" in callback.lines[0]
    assert "taken over" in callback.lines[0]


def test_a_full_disk_is_said_before_a_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    options = options_for(folder, epochs=1)
    monkeypatch.setattr("condconv_surgery.training.state.run_lock.os.write", full)
    with pytest.raises(InputError, match=r"run cannot be written: No space left on device(.|\n)*with space left"):
        finetune(small_net(), options)
    assert not Path(options.output).exists()
    monkeypatch.undo()
    assert finetune(small_net(), options).epochs == 1


def test_a_new_folder_is_removed_when_nothing_was_written(folder: Path) -> None:
    options = options_for(folder).updated({"layers": {"freeze": ["nowhere"]}})
    with pytest.raises(InputError, match="nowhere"):
        finetune(small_net(), options)
    assert not Path(options.output).exists()
