"""Set up the torch that the packaged neuron runs on, in an environment of its own.

torch and its CUDA libraries are several GB, so they are no part of a package. This command puts
them, in the versions of the lock that the package brings, beside what is there, tries the result,
and only then has the neuron use it. It needs no compiler, and with --wheelhouse no network.

    helexa-neuron-setup                     from the package index that pip is configured for
    helexa-neuron-setup --download DIR      fetch the files into DIR, for a host without network
    helexa-neuron-setup --wheelhouse DIR    install from DIR alone
    helexa-neuron-setup --check             is what is installed what the lock says?
"""

import argparse
import datetime
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_SHARE = Path("/usr/share/helexa-neuron")
_ROOT = Path("/var/lib/helexa-neuron")
# torch with the CUDA libraries it names, unpacked and compiled.
_NEEDED_BYTES = 9 << 30
_SUMS = "SHA256SUMS"
_TRIAL = "import torch; torch.zeros(2).sum(); print(torch.__version__, torch.version.cuda)"


class _SetupError(Exception):
    """Why it cannot be done, and what to do about it."""


def main() -> int:
    """Do what the command line asks for; return the exit code."""
    options = _parser().parse_args()
    try:
        if options.check:
            return _check(options)
        if options.download is not None:
            _download(options)
        else:
            _install(options)
    except _SetupError as exc:
        print(f"helexa-neuron-setup: {exc}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="helexa-neuron-setup",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--wheelhouse", metavar="DIR", type=Path, help="install from here, without network"
    )
    what.add_argument(
        "--download", metavar="DIR", type=Path, help="only fetch the files, into here"
    )
    what.add_argument(
        "--check", action="store_true", help="only look; the exit code is 1 unless all is well"
    )
    parser.add_argument(
        "--index-url",
        metavar="URL",
        help="take torch from this index, such as a mirror or one of builds for another CUDA",
    )
    parser.add_argument(
        "--no-compile",
        action="store_true",
        help="do not compile: half a minute less here, seconds more at each start of an engine",
    )
    parser.add_argument(
        "--no-restart", action="store_true", help="leave a running neuron with the earlier one"
    )
    parser.add_argument(
        "--root", metavar="DIR", type=Path, default=_ROOT, help=f"instead of {_ROOT}"
    )
    parser.add_argument("--share", type=Path, default=_SHARE, help=argparse.SUPPRESS)
    return parser


def _install(options: argparse.Namespace) -> None:
    share, root = options.share, options.root
    source = _source(options)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / ".lock").open("w")
    except OSError as exc:
        raise _SetupError(f"{root} cannot be written ({exc.strerror}): run it as root") from exc
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise _SetupError("another run of it is under way; wait for its end") from exc
        free_bytes = shutil.disk_usage(root).free
        if options.wheelhouse is None and free_bytes < _NEEDED_BYTES:
            raise _SetupError(
                f"{root} has {free_bytes / 2**30:.1f} GiB free, and torch with its CUDA libraries "
                f"takes about {_NEEDED_BYTES >> 30}: make room, or name another place by --root "
                "and make that a link to it"
            )
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
        fresh = Path(tempfile.mkdtemp(prefix=f"env-{stamp}-", dir=root))
        fresh.chmod(0o755)
        try:
            _fill(fresh, share, source, is_compiled=not options.no_compile)
            shown = _try(fresh)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        _switch(root, fresh)
        if not options.no_restart:
            _restart()
        for old in root.glob("env-*"):
            if old != fresh:
                shutil.rmtree(old, ignore_errors=True)
    version, cuda = shown.split()
    print(f"torch {version} ({'CPUs alone' if cuda == 'None' else f'CUDA {cuda}'}) is in {fresh}")


def _fill(fresh: Path, share: Path, source: list[str], *, is_compiled: bool) -> None:
    """Install the locked versions into an empty folder, and note what they are."""
    target = ["--no-deps", "--target", str(fresh / "site-packages"), *source]
    if not is_compiled:
        target.append("--no-compile")
    rest = _outside_the_lock(share, source)
    _pip(share, "install", *target, "--require-hashes", "-r", str(share / "torch.lock"))
    _pip(share, "install", *target, "--upgrade", *rest)
    (fresh / "installed.txt").write_text("\n".join([*_pins(share), *rest]) + "\n")
    (fresh / "lock.sha256").write_text(_fingerprint(share) + "\n")


def _outside_the_lock(share: Path, source: list[str]) -> list[str]:
    """Return `name==version` of torch and what its build is made of, such as CUDA libraries.

    They differ between the builds of one version, so torch's own metadata is their lock.
    """
    pins = _pins(share)
    with tempfile.TemporaryDirectory() as folder:
        constraints, report = Path(folder) / "constraints.txt", Path(folder) / "report.json"
        constraints.write_text("\n".join(pins) + "\n")
        torch = (share / "torch.txt").read_text().split()
        _pip(
            share,
            *("install", "--quiet", "--dry-run", "--ignore-installed", "--report", str(report)),
            *(*source, "--constraint", str(constraints), *torch),
        )
        found = [each["metadata"] for each in json.loads(report.read_text())["install"]]
    locked = {_normalised(pin.partition("==")[0]) for pin in pins}
    return [
        f"{each['name']}=={each['version']}"
        for each in found
        if _normalised(each["name"]) not in locked
    ]


def _try(fresh: Path) -> str:
    """Return versions of torch and CUDA as the new torch tells them."""
    done = subprocess.run(
        [sys.executable, "-c", _TRIAL],
        env={**os.environ, "PYTHONPATH": str(fresh / "site-packages")},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise _SetupError(f"the torch that was installed does not work, so it is not used: {last}")
    return done.stdout.strip()


def _switch(root: Path, fresh: Path) -> None:
    link = root / "env.new"
    link.unlink(missing_ok=True)
    link.symlink_to(fresh.name)
    link.replace(root / "env")


def _restart() -> None:
    if Path("/run/systemd/system").is_dir() and os.geteuid() == 0:
        subprocess.run(["/usr/bin/systemctl", "try-restart", "neuron.service"], check=False)


def _download(options: argparse.Namespace) -> None:
    folder: Path = options.download
    share = options.share
    folder.mkdir(parents=True, exist_ok=True)
    source = _source(options)
    rest = _outside_the_lock(share, source)
    target = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), *source]
    _pip(share, "download", *target, "--require-hashes", "-r", str(share / "torch.lock"))
    _pip(share, "download", *target, *rest)
    sums = [f"{_sha256(path)}  {path.name}\n" for path in sorted(folder.glob("*.whl"))]
    (folder / _SUMS).write_text("".join(sums))
    print(
        f"{len(sums)} files are in {folder}; on the host without network: "
        "helexa-neuron-setup --wheelhouse DIR"
    )


def _source(options: argparse.Namespace) -> list[str]:
    """Return pip's options for where files come from."""
    if options.wheelhouse is None:
        return ["--index-url", options.index_url] if options.index_url else []
    house: Path = options.wheelhouse
    if not house.is_dir():
        raise _SetupError(f"{house} is no folder; make one with --download where there is network")
    sums = house / _SUMS
    for line in sums.read_text().splitlines() if sums.exists() else []:
        expected, _, name = line.partition("  ")
        if not (house / name).is_file() or _sha256(house / name) != expected:
            raise _SetupError(f"{house / name} is missing or damaged; copy the wheelhouse again")
    return ["--no-index", "--find-links", str(house)]


def _check(options: argparse.Namespace) -> int:
    env = options.root / "env"
    if not env.exists():
        raise _SetupError(f"nothing is installed in {options.root}; run it without --check")
    shown = _try(env.resolve())
    print(f"torch {shown.split()[0]} works")
    if (env / "lock.sha256").read_text().strip() != _fingerprint(options.share):
        raise _SetupError("it was installed by another lock than this package's; run it again")
    return 0


def _pins(share: Path) -> list[str]:
    """Return `name==version` of what the lock names."""
    return re.findall(
        r"^[a-zA-Z0-9._-]+==[^ \\]+", (share / "torch.lock").read_text(), re.MULTILINE
    )


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _fingerprint(share: Path) -> str:
    return hashlib.sha256(
        b"".join((share / name).read_bytes() for name in ("torch.lock", "torch.txt"))
    ).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pip(share: Path, *arguments: str) -> None:
    """Run the pip that the package brings, from its wheel."""
    wheel = next(share.glob("pip-*.whl"), None)
    if wheel is None:
        raise _SetupError(f"{share} lacks pip's wheel: install the package again")
    command = [sys.executable, f"{wheel}/pip", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, check=False).returncode != 0:
        raise _SetupError(
            "pip failed, see above; what was in use before still is. Where there is no network, "
            "see --download and --wheelhouse"
        )


if __name__ == "__main__":
    sys.exit(main())
