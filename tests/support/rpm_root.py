"""A fresh root that RPM packages are installed into: an overlay over this host's file system.

The host's own files stand in for the distribution's packages; a stub package says that they are
there. What the root's mounts are made in is the mount namespace of scripts/test-packages.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.support.processes import READY_S, STOP_S, answers

_STUB = """
Name: host
Version: 1
Release: 1
Summary: What the host brings
License: MIT
BuildArch: noarch
AutoReqProv: no
Provides: /bin/sh, glibc = {glibc}, libgcc, libstdc++, python(abi) = {abi}, shadow-utils, systemd
%description
What the host brings.
%files
"""
# Notes what is asked of systemd, which does not run in the root.
_SYSTEMCTL = '#!/bin/sh\necho "$*" >>/systemctl.log\n'
_ENVIRONMENT = {
    "PATH": "/usr/bin:/usr/sbin:/bin:/sbin",
    "LANG": "C.UTF-8",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


class Root:
    """An installed system.

    Attributes:
        path: where its files are seen from outside.
    """

    def __init__(self, scratch: Path) -> None:
        self.path = scratch / "root"
        self._scratch = scratch
        self._bound: list[str] = []
        self._empty = scratch / "empty"
        for each in (self.path, self._empty, scratch / "upper", scratch / "work"):
            each.mkdir(parents=True)
        layers = f"lowerdir=/,upperdir={scratch}/upper,workdir={scratch}/work"
        _run(["mount", "-t", "overlay", "overlay", "-o", layers, str(self.path)])
        for kind, place in (("proc", "proc"), ("tmpfs", "run"), ("tmpfs", "tmp")):
            _run(["mount", "-t", kind, kind, str(self.path / place)])
        self.bind(Path("/dev"), "/dev")
        # The host's own packages of Cortex, should it have any, are none of this root's.
        (self.path / "run/systemd/system").mkdir(parents=True)
        self.write("/usr/bin/systemctl", _SYSTEMCTL, mode=0o755)

    def close(self) -> None:
        """Unmount it."""
        for place in (*self._bound, "/tmp", "/run", "/proc", "/"):
            _run(["umount", "--lazy", str(self.file(place))])
        shutil.rmtree(self._scratch, ignore_errors=True)

    def bind(self, folder: Path, path: str) -> None:
        """Show a folder of the host in the root."""
        self.file(path).mkdir(exist_ok=True)
        _run(["mount", "--bind", str(folder), str(self.file(path))])
        self._bound.append(path)

    def file(self, path: str) -> Path:
        """Return where a file of the root is seen from outside."""
        return self.path / path.lstrip("/")

    def write(self, path: str, text: str, *, mode: int = 0o644) -> None:
        """Write a file, replacing what the host has there."""
        place = self.file(path)
        place.unlink(missing_ok=True)
        place.write_text(text)
        place.chmod(mode)

    def dnf(self, repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run dnf on the root with one repository and none of the host's configuration."""
        command = [
            *("dnf", "--assumeyes", f"--installroot={self.path}", "--releasever=1", "--nogpgcheck"),
            *(f"--setopt=reposdir={self._empty}", f"--setopt=cachedir={self._scratch}/cache"),
            *("--setopt=keepcache=0", "--setopt=install_weak_deps=0"),
            *(f"--repofrompath={repository.name},file://{repository}", f"--repo={repository.name}"),
            *arguments,
        ]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def run(self, *command: str, user: str = "root") -> subprocess.CompletedProcess[str]:
        """Run a command inside, to its end."""
        return subprocess.run(
            self._inside(command, user),
            env=_ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )

    def installed(self) -> list[str]:
        """Return the names of the installed packages besides the stub."""
        shown = _run(["rpm", "--root", str(self.path), "-qa", "--qf", "%{NAME}\n"])
        return sorted(set(shown.split()) - {"host"})

    def asked_of_systemd(self) -> list[str]:
        """Return the calls of systemctl so far, and forget them."""
        log = self.file("/systemctl.log")
        calls = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return calls

    @contextlib.contextmanager
    def service(self, url: str, *command: str, user: str, **variables: str) -> Iterator[None]:
        """Run a service as its unit does until it answers; SIGTERM has to end it cleanly."""
        log = self._scratch / f"{user}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                self._inside(command, user),
                env=_ENVIRONMENT | variables,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            deadline_s = time.monotonic() + READY_S
            while not answers(url):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline_s, log.read_text()
                time.sleep(0.1)
            yield
            process.send_signal(signal.SIGTERM)
            assert process.wait(STOP_S) == 0, log.read_text()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _inside(self, command: Sequence[str], user: str) -> list[str]:
        # chroot becomes the user in the same process, so that signals reach the command.
        who = [] if user == "root" else [f"--userspec={user}:{user}"]
        return ["chroot", *who, str(self.path), *command]


def make_repository(packages: Path, stub: Path) -> Path:
    """Make a repository of the packages in a folder and the stub."""
    shutil.copy(stub, packages)
    _run(["createrepo_c", "--quiet", str(packages)])
    return packages


def make_stub(folder: Path) -> Path:
    """Build the package that stands for the host."""
    spec = folder / "host.spec"
    abi = f"{sys.version_info.major}.{sys.version_info.minor}"
    glibc = os.confstr("CS_GNU_LIBC_VERSION") or ""
    spec.write_text(_STUB.format(abi=abi, glibc=glibc.split()[-1]))
    _run(["rpmbuild", "--quiet", "-bb", "--define", f"_topdir {folder}/stub", str(spec)])
    (found,) = folder.glob("stub/RPMS/noarch/host-*.rpm")
    return found


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout
