"""The types that schemas allow, also those that are written to hurt."""

from typing import Any

import pytest

from cortex.neuron.chat.schema import excess, json_types


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


def chain(length: int) -> dict[str, Any]:
    defs: dict[str, Any] = {
        f"d{at}": {"properties": {"next": {"$ref": f"#/$defs/d{at + 1}"}}} for at in range(length)
    }
    return {"$defs": defs, "$ref": "#/$defs/d0"}


def test_an_everyday_schema_is_not_too_large() -> None:
    assert excess(chain(100)) is None
    assert excess({"$ref": "#"}) is None
    assert excess({"properties": {f"p{at}": {"type": "string"} for at in range(1000)}}) is None


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        # A compiler that recurses along these references overflows its stack.
        (chain(400), "nested over 1000 levels"),
        ({"anyOf": [{"$ref": f"other#/{at}"} for at in range(400)]}, "nested over 1000 levels"),
        ({"properties": {f"p{at}": {} for at in range(1001)}}, "an object of over 1000 entries"),
        ({"anyOf": [{} for _ in range(20_001)]}, "over 20000 objects and lists"),
    ],
)
def test_a_schema_that_is_too_large_to_compile_says_why(schema: dict[str, Any], words: str) -> None:
    assert words in (excess(schema) or "")


def test_types_found_once_are_remembered_for_other_parameters() -> None:
    root: dict[str, Any] = {"$defs": {"a": {"type": "integer"}}}
    known: dict[int, frozenset[str]] = {}
    assert json_types({"$ref": "#/$defs/a"}, root, known) == {"integer"}
    assert known == {id(root["$defs"]["a"]): frozenset(["integer"])}


def test_an_absurdly_long_reference_reads_as_any() -> None:
    root = {"x": {"type": "integer"}}
    assert json_types({"$ref": "#/x"}, root) == {"integer"}
    assert json_types({"$ref": "#/x" + "/y" * 1000}, {"x": {"y": {}}}) == frozenset()
