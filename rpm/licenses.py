"""Gather the licences of what a tree of installed distributions holds.

python rpm/licenses.py SITE_PACKAGES FOLDER

FOLDER gets the texts, by distribution, and a list of them all, BUNDLED.
"""

import importlib.metadata
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

# Where the metadata names the licence in words only.
_EXPRESSIONS = {
    "aiohappyeyeballs": "PSF-2.0",
    "aiosignal": "Apache-2.0",
    "async-timeout": "Apache-2.0",
    "certifi": "MPL-2.0",
    "charset-normalizer": "MIT",
    "Deprecated": "MIT",
    "frozenlist": "Apache-2.0",
    "gguf": "MIT",
    "h11": "MIT",
    "huggingface_hub": "Apache-2.0",
    "Hypercorn": "MIT",
    "hyperframe": "MIT",
    "Jinja2": "BSD-3-Clause",
    "markdown-it-py": "MIT",
    "mdurl": "MIT",
    "nvidia-ml-py": "BSD-3-Clause",
    "priority": "MIT",
    "propcache": "Apache-2.0",
    "PyYAML": "MIT",
    "requests": "Apache-2.0",
    "rich": "MIT",
    "safetensors": "Apache-2.0",
    "tokenizers": "Apache-2.0",
    "tqdm": "MPL-2.0 AND MIT",
    "yarl": "Apache-2.0",
}
# Wheels that come without a text: of the same licence, or in the head of a module.
_SAME_TEXT = {"tokenizers": "safetensors"}
_IN_SOURCE = {"nvidia-ml-py": "pynvml.py"}


def main() -> None:
    """Copy the texts and write the list."""
    site, folder = Path(sys.argv[1]), Path(sys.argv[2])
    lines = []
    for each in installed(site):
        for text in texts(each, site):
            target = folder / each.name / _flat_name(text)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(text, target)
        lines.append(f"{each.name} {each.version}: {expression(each.name, each.metadata)}\n")
    (folder / "BUNDLED").write_text("".join(lines))


def installed(site: Path) -> list[importlib.metadata.Distribution]:
    """Return what is installed in a folder besides cortex itself, by name."""
    found = importlib.metadata.distributions(path=[str(site)])
    return sorted((each for each in found if each.name != "cortex"), key=lambda each: each.name)


def expression(name: str, metadata: Mapping[str, str]) -> str:
    """Return the SPDX expression of a distribution's licence."""
    known = metadata.get("License-Expression") or _EXPRESSIONS.get(name)
    if known is None:
        raise SystemExit(f"{name} has no License-Expression: write it down in {__file__}")
    return known


def texts(distribution: importlib.metadata.Distribution, site: Path) -> list[Path]:
    """Return the files that hold a distribution's licences."""
    name = distribution.name
    if name in _IN_SOURCE:
        return [site / _IN_SOURCE[name]]
    (holder,) = importlib.metadata.distributions(path=[str(site)], name=_SAME_TEXT.get(name, name))
    found = [
        Path(str(file.locate()))
        for file in holder.files or []
        if ".dist-info/" in str(file)
        and any(word in file.name.upper() for word in ("LICEN", "COPYING", "NOTICE"))
    ]
    if not found:
        raise SystemExit(f"{name} comes without the text of its licence: see {__file__}")
    return found


def _flat_name(text: Path) -> str:
    parts = text.parts
    if text.suffix == ".py":
        return f"{text.name}.txt"
    inside = [index for index, part in enumerate(parts) if part.endswith(".dist-info")]
    return "-".join(part for part in parts[inside[0] + 1 :] if part != "licenses")


if __name__ == "__main__":
    main()
