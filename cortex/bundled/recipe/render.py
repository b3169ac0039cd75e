"""Renders dialogues with the shipped chat template and marks the tokens to learn."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from tokenizers import Tokenizer

MODEL_DIR = Path(__file__).parents[1] / "cortex-tiny"


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def load_template(path: Path = MODEL_DIR / "chat_template.jinja") -> jinja2.Template:
    """Return the chat template, compiled in a sandbox as servers do it."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = _to_json
    env.globals["raise_exception"] = _raise_exception
    return env.from_string(path.read_text())


def render(
    template: jinja2.Template,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    **options: bool,
) -> str:
    """Return the text of a dialogue; options go to the template."""
    return template.render(messages=messages, tools=tools, **options)


class Encoder:
    """Turns dialogues into token ids with one weight per token."""

    def __init__(self, tokenizer: Tokenizer, template: jinja2.Template) -> None:
        self._tokenizer = tokenizer
        self._template = template
        ids: Mapping[str, int] = tokenizer.get_vocab()
        self._turn = [ids["<|im_start|>"], *tokenizer.encode("assistant\n").ids]
        self._think, self._unthink, self.end = ids["<think>"], ids["</think>"], ids["<|im_end|>"]
        self._blank = tokenizer.encode("\n\n").ids

    def encode(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> tuple[list[int], list[bool]]:
        """Return the ids and, for each, whether the model itself has to write it."""
        ids = self._tokenizer.encode(render(self._template, messages, tools)).ids
        own = [False] * len(ids)
        width, idx = len(self._turn), 0
        while idx < len(ids):
            if ids[idx : idx + width] != self._turn:
                idx += 1
                continue
            # The prompt itself holds "<think>", a newline and, without thinking, the whole block.
            idx += width + 1
            if ids[idx : idx + 2] == [*self._blank, self._unthink]:
                idx += 2 + len(self._blank)
            else:
                idx += 1
            while idx < len(ids):
                own[idx] = True
                idx += 1
                if ids[idx - 1] == self.end:
                    break
        return ids, own
