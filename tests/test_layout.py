"""What the linters cannot hold."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "cortex").rglob("*.py"))

# The places where an unexpected exception is caught, logged and made visible.
BLIND_EXCEPTS = {
    "core/web.py",
    "neuron/supervisor.py",
    "neuron/engine/embedder.py",
    "neuron/engine/engine.py",
    "neuron/engine/process.py",
    "neuron/app.py",
    "neuron/chat/tokenizer.py",  # the tokenizers library raises plain Exception
    "gateway/app.py",
    "gateway/loads.py",
    "gateway/reload.py",
    "gateway/watch.py",
    "gateway/steward.py",
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT / "cortex").as_posix()


@pytest.mark.parametrize(
    "path", [each for each in MODULES if each.name == "__init__.py"], ids=relative
)
def test_a_package_holds_nothing_but_a_docstring(path: Path):
    body = ast.parse(path.read_text()).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_no_generator_yields_inside_a_timeout_or_task_group(path: Path):
    for function in ast.walk(ast.parse(path.read_text())):
        if not isinstance(function, ast.AsyncFunctionDef) or _is_context_manager(function):
            continue
        for block in ast.walk(function):
            if isinstance(block, ast.AsyncWith) and any(_is_scope(item) for item in block.items):
                inner = [node for stmt in block.body for node in ast.walk(stmt)]
                assert not any(isinstance(node, ast.Yield) for node in inner), (
                    f"{relative(path)}:{block.lineno}"
                )


def _is_context_manager(function: ast.AsyncFunctionDef) -> bool:
    return any("contextmanager" in ast.unparse(each) for each in function.decorator_list)


def _is_scope(item: ast.withitem) -> bool:
    text = ast.unparse(item.context_expr)
    return text.startswith(("asyncio.timeout", "asyncio.TaskGroup", "TaskGroup", "timeout("))


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_blind_excepts_stand_only_in_the_named_places(path: Path):
    handlers = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"})
        and not any(isinstance(inner, ast.Raise) and inner.exc is None for inner in node.body)
    ]
    if relative(path) not in BLIND_EXCEPTS:
        assert not handlers, f"{relative(path)}:{handlers[0].lineno}"


@pytest.mark.parametrize(
    "kernel",
    [
        "gated_delta_rule_recurrence",
        "chunked_gated_delta_rule_recurrence",
        "causal_conv1d_update",
        "causal_conv1d_full",
        "fused_gdn_gating",
        "gdn_gated_norm",
        "gdn_decode_step",
        "gdn_prefill",
        "gdn_verify",
    ],
)
def test_every_operator_has_launchers_a_wrapper_a_plain_form_and_a_test_of_its_name(kernel: str):
    contract = (ROOT / "csrc" / "gdn.h").read_text()
    assert f"int gdn_cpu_{kernel}(" in contract
    assert f"int gdn_cuda_{kernel}(" in contract
    assert f'"{kernel}(' in (ROOT / "csrc" / "bindings.cpp").read_text()
    kernels = ROOT / "cortex" / "neuron" / "kernels"
    assert f"def {kernel}(" in (kernels / "gdn.py").read_text()
    assert f"def {kernel}(" in (kernels / "gdn_torch.py").read_text()
    tests = ROOT / "tests" / "neuron" / "kernels"
    assert any(kernel in path.read_text() for path in tests.glob("test_*.py"))
