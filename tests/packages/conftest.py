"""The packages that scripts/test-packages has built, and a root to install them into."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.rpm_root import Root, make_repository, make_stub


@dataclass(frozen=True)
class Built:
    """What there is to install.

    Attributes:
        first, newer: repositories; the second has the next version, with a changed sample of
            cortex.toml.
        flavours: what the first one has; the second has the second of them.
        wheelhouse: what helexa-neuron-setup installs from.
    """

    first: Path
    newer: Path
    flavours: list[str]
    wheelhouse: Path

    def package(self, name: str) -> Path:
        """Return the package of a name in the first repository."""
        (found,) = self.first.glob(f"{name}-[0-9]*.x86_64.rpm")
        return found


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    told = os.environ.get("CORTEX_PACKAGES")
    if told is None:
        pytest.skip("scripts/test-packages builds the packages and runs these tests")
    folder = Path(told)
    stub = make_stub(tmp_path_factory.mktemp("stub"))
    first, newer = (make_repository(folder / name, stub) for name in ("first", "second"))
    return Built(
        first=first,
        newer=newer,
        flavours=os.environ["CORTEX_PACKAGES_FLAVOURS"].split(),
        wheelhouse=folder / "wheelhouse",
    )


@pytest.fixture(scope="module")
def root(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Root]:
    found = Root(tmp_path_factory.mktemp("packages"))
    yield found
    found.close()
