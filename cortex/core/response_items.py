"""The input of a response as it is kept and listed: whole items, page by page."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from cortex.core.decode import decode_body, decode_query
from cortex.core.errors import BadRequestError
from cortex.core.responses import RESPONSE_PREFIX, ResponsesRequest

MAX_PAGE_ITEMS = 100

_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}

_object_decoder = msgspec.json.Decoder(dict[str, Any])


class ItemPage(msgspec.Struct, kw_only=True, frozen=True):
    """A page of input items."""

    object: Literal["list"] = "list"
    data: list[Any]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class ItemsQuery(msgspec.Struct, kw_only=True, frozen=True):
    """Which part of the input items a caller wants, the latest first unless told otherwise."""

    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE_ITEMS)] = 20
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None


def parse_items_query(parameters: dict[str, str]) -> ItemsQuery:
    """Decode the query of a listing; raises BadRequestError where a parameter is out of bounds."""
    return decode_query(ItemsQuery, parameters)


def item_page(items: list[dict[str, Any]], query: ItemsQuery) -> ItemPage:
    """Return a page of items, which are in the order in which they were sent.

    Raises:
        BadRequestError: `after` is none of them.
    """
    ordered = items if query.order == "asc" else items[::-1]
    begin = 0
    if query.after is not None:
        ids = [item.get("id") for item in ordered]
        if query.after not in ids:
            raise BadRequestError(f"after: there is no item '{query.after[:64]}'", param="after")
        begin = ids.index(query.after) + 1
    page = ordered[begin : begin + query.limit]
    return ItemPage(
        data=page,
        first_id=page[0]["id"] if page else None,
        last_id=page[-1]["id"] if page else None,
        has_more=begin + len(page) < len(ordered),
    )


def kept_items(request: ResponsesRequest, raws: list[msgspec.Raw], response_id: str) -> bytes:
    """Return a request's own input as it is kept: each item with an id, a type and a list."""
    suffix = response_id.removeprefix(RESPONSE_PREFIX)
    items: list[dict[str, Any]] = [{"role": "user", "content": request.input}]
    if not isinstance(request.input, str):
        items = [decode_body(_object_decoder, bytes(raw)) for raw in raws]
    full = [_full_item(item, f"{suffix}i{at:04x}") for at, item in enumerate(items)]
    return msgspec.json.encode(full)


def _full_item(item: dict[str, Any], suffix: str) -> dict[str, Any]:
    kind = item.get("type") or "message"
    full = {**item, "type": kind, "id": item.get("id") or f"{_PREFIXES.get(kind, 'item')}_{suffix}"}
    if kind == "message" and isinstance(item.get("content"), str):
        part = "output_text" if item.get("role") == "assistant" else "input_text"
        full["content"] = [{"type": part, "text": item["content"]}]
    return full
