"""Write the man pages and the shell completions of `cortex` from its own help.

python rpm/manual.py MAN_FOLDER COMPLETION_FOLDER
"""

import re
import sys
from pathlib import Path

import click
from click.shell_completion import BashComplete, FishComplete, ZshComplete

from cortex.cli import main as cortex
from cortex.core.build import version

_SEE_ALSO = "Documentation: /usr/share/doc/cortex"


def main() -> None:
    """Write one page for each command, and one completion for each shell."""
    man, completions = Path(sys.argv[1]), Path(sys.argv[2])
    man.mkdir(parents=True, exist_ok=True)
    completions.mkdir(parents=True, exist_ok=True)
    _write_pages(cortex, click.Context(cortex, info_name="cortex"), man)
    for shell in (BashComplete, FishComplete, ZshComplete):
        source = shell(cortex, {}, "cortex", "_CORTEX_COMPLETE").source()
        (completions / f"cortex.{shell.name}").write_text(source)


def _write_pages(command: click.Command, context: click.Context, folder: Path) -> None:
    name = context.command_path.replace(" ", "-")
    (folder / f"{name}.1").write_text(page(command, context))
    if isinstance(command, click.Group):
        for each in command.list_commands(context):
            inner = command.get_command(context, each)
            assert inner is not None
            _write_pages(inner, click.Context(inner, info_name=each, parent=context), folder)


def page(command: click.Command, context: click.Context) -> str:
    """Return the man page of one command."""
    path = context.command_path
    name = path.replace(" ", "-")
    title, *rest = _paragraphs(command.help or "")
    lines = [
        f'.TH {name.upper()} 1 "" "cortex {version().package_version}" "User Commands"',
        *(".SH NAME", f"{_escape(name)} \\- {_escape(title.rstrip('.'))}"),
        ".SH SYNOPSIS",
        f".B {_escape(path)}",
        _escape(" ".join(command.collect_usage_pieces(context))),
    ]
    if rest:
        lines.append(".SH DESCRIPTION")
        for each in rest:
            lines += [".PP", *_paragraph(each)]
    options = [param.get_help_record(context) for param in command.get_params(context)]
    lines.append(".SH OPTIONS")
    for option in options:
        if option is not None:
            lines += [".TP", f".B {_escape(option[0])}", _escape(option[1])]
    if isinstance(command, click.Group):
        lines.append(".SH COMMANDS")
        for each in command.list_commands(context):
            inner = command.get_command(context, each)
            assert inner is not None
            short = inner.get_short_help_str(limit=200)
            lines += [".TP", f".BR {_escape(name)}\\-{_escape(each)} (1)", _escape(short)]
    lines.append(".SH SEE ALSO")
    if context.parent is not None:
        lines.append(f".BR {_escape(context.parent.command_path.replace(' ', '-'))} (1)")
        lines.append(".PP")
    lines.append(_escape(_SEE_ALSO))
    return "\n".join(lines) + "\n"


def _paragraphs(text: str) -> list[str]:
    return [each.strip("\n") for each in re.split(r"\n\s*\n", text) if each.strip()]


def _paragraph(text: str) -> list[str]:
    # click's mark: these lines are not to be filled.
    if text.startswith("\b"):
        return [".nf", *(_escape(line) for line in text.lstrip("\b\n").splitlines()), ".fi"]
    return [_escape(" ".join(text.split()))]


def _escape(text: str) -> str:
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    # A dot or an apostrophe at the start of a line is a request.
    return re.sub(r"^([.'])", r"\\&\1", escaped)


if __name__ == "__main__":
    main()
