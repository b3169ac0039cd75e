"""The types that schemas allow, also those that are written to hurt."""

from typing import Any

import pytest

from cortex.neuron.chat.schema import json_types


@pytest.mark.parametrize("key", ["anyOf", "oneOf"])
def test_a_schema_that_refers_to_itself_many_times_costs_no_more_than_its_size(key: str) -> None:
    # Each level has as many branches: without a memory this would be 40^16 steps.
    root: dict[str, Any] = {"properties": {"city": {key: [{"$ref": "#/properties/city"}] * 40}}}
    assert json_types(root["properties"]["city"], root) == frozenset()


def test_branches_that_share_a_definition_have_its_types() -> None:
    root: dict[str, Any] = {"$defs": {"a": {"type": "integer"}, "b": {"type": "null"}}}
    schema = {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}, {"$ref": "#/$defs/a"}]}
    assert json_types(schema, root) == {"integer", "null"}


def test_a_deep_nest_of_branches_reads_as_any() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(500):
        schema = {"anyOf": [schema, {"type": "null"}]}
    assert json_types(schema, {}) == frozenset()
