"""What a hostile template may cost."""

import itertools

import msgspec
import pytest

from cortex.core.errors import TemplateRenderError
from cortex.core.openai import Message
from cortex.neuron.chat import sandbox
from cortex.neuron.chat.template import ChatTemplate

USER = msgspec.convert([{"role": "user", "content": "Hi"}], list[Message])

MACRO_TREE = (
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(99) }}"
)
TWO_LOOPS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = b %}{% endfor %}{% endfor %}"
)
LOOP_OF_NOTHING = (
    "{% for a in range(99) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}"
)

DOUBLING = (
    "{{% set n = namespace(x='x') %}}"
    "{{% for _ in range(99) %}}{{% set n.x = n.x {} n.x %}}{{% endfor %}}"
)


def render(source: str) -> str:
    return ChatTemplate(source, model_id="hostile").render(USER)


@pytest.mark.parametrize("source", [TWO_LOOPS, LOOP_OF_NOTHING, MACRO_TREE])
def test_a_template_that_loops_without_end_is_stopped(
    monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr(sandbox, "MAX_STEPS", 1000)
    with pytest.raises(TemplateRenderError, match="takes over 1000 steps"):
        render(source)


def test_a_template_whose_turns_are_slow_is_stopped_by_the_clock() -> None:
    ticks = itertools.count(0.0, 4.0)
    template = ChatTemplate(
        "{% for m in range(9) %}{{ m }}{% endfor %}",
        model_id="hostile",
        clock=lambda: next(ticks),
    )
    with pytest.raises(TemplateRenderError, match="takes over 10 s"):
        template.render(USER)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 99999999999 }}",
        "{{ 99999999999 * 'x' }}",
        "{{ ([1] * 99999999999) | length }}",
        DOUBLING.format("~"),
        DOUBLING.format("+"),
    ],
)
def test_a_template_that_builds_an_absurdly_long_value_is_stopped(source: str) -> None:
    with pytest.raises(TemplateRenderError, match="a value of over 16777216"):
        render(source)


def test_a_template_that_computes_an_absurdly_large_power_is_stopped() -> None:
    with pytest.raises(TemplateRenderError, match="a power of over 4096 bits"):
        render("{{ 9 ** (9 ** 9) }}")


def test_a_template_cannot_replace_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_STEPS", 10)
    with pytest.raises(TemplateRenderError, match="takes over 10 steps"):
        render("{% set take_step = 1 %}{% for a in range(99) %}{{ a }}{% endfor %}")


def test_each_rendering_has_a_budget_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_STEPS", 10)
    template = ChatTemplate("{% for a in range(9) %}{{ a }}{% endfor %}", model_id="m")
    assert [template.render(USER), template.render(USER)] == ["012345678", "012345678"]


def test_metered_loops_read_as_any_others() -> None:
    source = (
        "{% for a in range(6) if a % 2 %}{{ loop.index }}/{{ loop.length }}:{{ a }}"
        "{{ ',' if not loop.last }}{% else %}none{% endfor %}"
        "{% for a in [] %}{% else %} none{% endfor %}"
        "{% for a in [1, [2, [3]]] recursive %}"
        "{{ loop(a) if a is iterable else ' ' ~ a }}{% endfor %}"
        "{% macro m(a, b=2) %} {{ a + b }} {{ varargs | length }}{% endmacro %}{{ m(1) }}"
        "{% macro w() %}<{{ caller() }}>{% endmacro %} {% call w() %}in{% endcall %}"
        "{% for k, v in {'x': 1}.items() %} {{ k ~ v }}{% break %}{% endfor %} {{ 2 ** 3 * 2 }}"
    )
    assert render(source) == "1/3:1,2/3:3,3/3:5 none 1 2 3 3 0 <in> x1 16"
