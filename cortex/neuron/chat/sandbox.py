"""Where chat templates run: they come with a checkpoint, so what they may cost has a bound."""

import time
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.visitor

MAX_STEPS = 1_000_000  # turns of loops and calls of macros in one rendering
MAX_RENDER_S = 10.0
MAX_VALUE_CHARS = 16 << 20  # of a text, or items of a list, that a template puts together
MAX_POWER_BITS = 4096

Clock = Callable[[], float]

# No template can spell it, so none can replace it.
_BUDGET = "\0budget"


class _Budget:
    """What is left of one rendering's steps and time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._deadline_s = clock() + MAX_RENDER_S
        self._num_steps = 0

    def take(self) -> None:
        self._num_steps += 1
        if self._num_steps > MAX_STEPS:
            raise jinja2.TemplateRuntimeError(f"it takes over {MAX_STEPS} steps")
        if self._clock() > self._deadline_s:
            raise jinja2.TemplateRuntimeError(f"it takes over {MAX_RENDER_S:.0f} s")


def budget(clock: Clock = time.monotonic) -> dict[str, Any]:
    """Return what a rendering's context must hold, made afresh for each one."""
    return {_BUDGET: _Budget(clock)}


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the model wrote, for training; rendering ignores it."""

    tags = {"generation"}  # noqa: RUF012 - the name and type are jinja2's

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Renders untrusted templates; each rendering's context must hold a `budget`."""

    # Unlike `~`, whose results are measured by `_Metered`, these go through `call_binop`.
    intercepted_binops = frozenset(["+", "*", "**"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _Generation],
        )

    def template(self, source: str) -> jinja2.Template:
        """Compile a template, metered.

        Raises:
            jinja2.TemplateError: its syntax is not valid.
            RecursionError: it is nested too deep.
        """
        return self.from_string(_Metered().visit(self.parse(source)))

    @staticmethod
    @jinja2.pass_context
    def take_step(context: jinja2.runtime.Context) -> bool:
        """Count one turn of a loop or call of a macro; always true."""
        context.parent[_BUDGET].take()
        return True

    @staticmethod
    def measured(value: Any) -> Any:
        """Return a value that is not too long.

        Raises:
            jinja2.TemplateRuntimeError: it is.
        """
        if isinstance(value, str | list | tuple):
            _check_length(len(value))
        return value

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        """Compute `+`, `*` and `**`, unless the result would be absurdly large."""
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > MAX_POWER_BITS:
                raise jinja2.TemplateRuntimeError(f"a power of over {MAX_POWER_BITS} bits")
        elif operator == "*":
            for items, times in ((left, right), (right, left)):
                if isinstance(items, str | list | tuple) and isinstance(times, int):
                    _check_length(len(items) * times)
        return self.measured(super().call_binop(context, operator, left, right))


def _check_length(length: int) -> None:
    if length > MAX_VALUE_CHARS:
        raise jinja2.TemplateRuntimeError(f"it makes a value of over {MAX_VALUE_CHARS} characters")


class _Metered(jinja2.visitor.NodeTransformer):
    """Makes every turn of a loop and every call of a macro take a step of the budget."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:  # noqa: N802
        self.generic_visit(node)
        step = _call("take_step", [], node.lineno)
        if node.test is None:
            node.body.insert(0, jinja2.nodes.ExprStmt(step, lineno=node.lineno))
        else:
            # Turns that the loop leaves out count as well.
            node.test = jinja2.nodes.And(step, node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: jinja2.nodes.Macro) -> jinja2.nodes.Node:  # noqa: N802
        self.generic_visit(node)
        step = _call("take_step", [], node.lineno)
        node.body.insert(0, jinja2.nodes.ExprStmt(step, lineno=node.lineno))
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("measured", [node], node.lineno)


def _call(name: str, arguments: list[jinja2.nodes.Expr], line: int) -> jinja2.nodes.Call:
    function = jinja2.nodes.EnvironmentAttribute(name, lineno=line)
    return jinja2.nodes.Call(function, arguments, [], None, None, lineno=line)
