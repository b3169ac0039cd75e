"""Measures cortex-tiny, greedily: in this process, or over a server with an OpenAI API.

`python -m cortex.bundled.recipe.evaluate` runs transformers without any constraint;
`--url http://127.0.0.1:31313/v1` asks a running server instead.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec
import openai
import torch
from tokenizers import Tokenizer
from transformers import Qwen3_5ForCausalLM

from cortex.bundled.recipe import render
from cortex.bundled.recipe.cases import Case, Reply, chat_cases, judge, read_calls, tool_cases

_MAX_TOKENS = 200


Ask = Callable[[Case], Reply]


def local_ask(folder: Path) -> Ask:
    """Return a way to ask the model in this process, unconstrained."""
    torch.set_num_threads(1)
    model = Qwen3_5ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    template = render.load_template(folder / "chat_template.jinja")
    end = tokenizer.get_vocab()["<|im_end|>"]

    def ask(case: Case) -> Reply:
        prompt = render.render(
            template,
            case.messages,
            case.tools,
            add_generation_prompt=True,
            enable_thinking=case.thinking,
        )
        ids = tokenizer.encode(prompt).ids
        new = _generate(model, ids)
        text = tokenizer.decode(new, skip_special_tokens=True)
        if case.thinking:
            text = text.partition("</think>\n\n")[2]
        return Reply(text=text, calls=read_calls(text), ended=new[-1] == end)

    return ask


def _generate(model: Any, ids: list[int]) -> list[int]:
    """Return the greedy continuation; transformers' own types do not admit its own class."""
    out = model.generate(torch.tensor([ids]), max_new_tokens=_MAX_TOKENS, do_sample=False)
    new: list[int] = out[0, len(ids) :].tolist()
    return new


def server_ask(url: str, name: str) -> Ask:
    """Return a way to ask a server with an OpenAI API."""
    client = openai.OpenAI(base_url=url, api_key="none", timeout=120)

    def ask(case: Case) -> Reply:
        options: dict[str, Any] = {"tools": case.tools} if case.tools else {}
        if case.thinking:
            options["extra_body"] = {"chat_template_kwargs": {"enable_thinking": True}}
        messages: Any = case.messages
        answer = client.chat.completions.create(
            model=name, messages=messages, temperature=0, max_tokens=_MAX_TOKENS, **options
        )
        choice = answer.choices[0]
        calls: list[tuple[str, dict[str, Any]] | None] = []
        for call in choice.message.tool_calls or []:
            assert call.type == "function"
            try:
                given = msgspec.json.decode(call.function.arguments, type=dict[str, Any])
                calls.append((call.function.name, given))
            except msgspec.DecodeError:
                calls.append(None)
        text = choice.message.content or ""
        return Reply(text=text, calls=calls, ended=choice.finish_reason in ("stop", "tool_calls"))

    return ask


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=render.MODEL_DIR)
@click.option("--url", default="", help="Ask this OpenAI-compatible server instead.")
@click.option("--model", "name", default="cortex-tiny")
@click.option("--number", default=150, help="Generated tool cases, besides those by hand.")
@click.option("--seed", default=4242)
@click.option("--verbose", is_flag=True, help="Show each reply that is not right.")
def main(folder: Path, url: str, name: str, number: int, seed: int, verbose: bool) -> None:
    """Print a table of rates: one line per kind of question and mark."""
    ask = server_ask(url, name) if url else local_ask(folder)
    counts: dict[tuple[str, str], list[int]] = {}
    for case in tool_cases(number, seed) + chat_cases(seed):
        reply = ask(case)
        marks = judge(case, reply)
        group = "all tools" if case.call else "all chat"
        for mark, good in marks.items():
            for kind in (case.kind, group):
                pair = counts.setdefault((kind, mark), [0, 0])
                pair[0] += good
                pair[1] += 1
        if verbose and not all(marks.values()):
            wanted = case.call or case.answer
            click.echo(f"{case.kind}: {case.messages[-1]['content']!r}")
            click.echo(f"  wanted {wanted}\n  got {reply.calls or reply.text!r}")
    click.echo("| questions | mark | rate |\n| --- | --- | --- |")
    for (kind, mark), (right, total) in sorted(counts.items()):
        click.echo(f"| {kind} | {mark} | {right}/{total} |")


if __name__ == "__main__":
    main()
