import os
import signal
import subprocess
import sys
import tempfile

import pytest

from cortex.neuron.scratch import ScratchFolder, sweep

HOLDER = """
import signal, sys, tempfile
tempfile.tempdir = sys.argv[1]
from cortex.neuron.scratch import ScratchFolder
folder = ScratchFolder()
(folder.path / "s").touch()
print(folder.path, flush=True)
signal.pause()
"""


@pytest.fixture(autouse=True)
def _own_temporary_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_a_folder_is_private_and_gone_when_it_is_closed(tmp_path):
    folder = ScratchFolder()
    assert folder.path.parent == tmp_path
    assert folder.path.stat().st_mode & 0o777 == 0o700
    (folder.path / "s").touch()
    folder.close()
    folder.close()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_swept_and_what_is_in_use_stays(tmp_path):
    mine = ScratchFolder()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        theirs = holder.stdout.readline().strip()
        sweep()
        assert sorted(map(str, tmp_path.iterdir())) == sorted([str(mine.path), theirs])
        os.kill(holder.pid, signal.SIGKILL)
    sweep()
    assert list(tmp_path.iterdir()) == [mine.path]
    mine.close()


def test_neither_links_nor_other_folders_are_swept(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cortex-neuron-link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "cortex-neuron-file").touch()
    sweep()
    assert len(list(tmp_path.iterdir())) == 3
