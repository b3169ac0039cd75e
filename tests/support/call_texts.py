"""Tool calls as models of each format write them."""

import json
from typing import Any

from cortex.core.neuron_api import ToolFormat


def written(name: ToolFormat, calls: list[tuple[str, Any]]) -> str:
    """Return what a model writes for these calls, each a name and its arguments."""
    match name:
        case "qwen_xml":
            return "\n".join(_xml(*call) for call in calls)
        case "hermes":
            return "\n".join(
                f"<tool_call>\n{_object(*call, 'arguments')}\n</tool_call>" for call in calls
            )
        case "llama3":
            return "; ".join(_object(*call, "parameters") for call in calls)
        case "mistral":
            return "".join(
                f"[TOOL_CALLS]{called}[ARGS]{json.dumps(arguments, ensure_ascii=False)}"
                for called, arguments in calls
            )
        case "mistral_list":
            return f"[TOOL_CALLS] [{', '.join(_object(*call, 'arguments') for call in calls)}]"


def _object(name: str, arguments: Any, key: str) -> str:
    return json.dumps({"name": name, key: arguments}, ensure_ascii=False)


def _xml(name: str, arguments: dict[str, Any]) -> str:
    inner = "".join(
        f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}"
        "\n</parameter>\n"
        for key, value in arguments.items()
    )
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"
