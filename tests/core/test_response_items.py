import msgspec
import pytest

from cortex.core.errors import BadRequestError
from cortex.core.response_items import ItemsQuery, item_page, kept_items, parse_items_query
from cortex.core.responses import parse_request

ITEMS = [{"id": f"msg_{at}"} for at in range(3)]


def test_a_page_of_items_begins_with_the_latest_and_goes_on_after_its_last():
    first = item_page(ITEMS, ItemsQuery(limit=2))
    assert [item["id"] for item in first.data] == ["msg_2", "msg_1"]
    assert (first.first_id, first.last_id, first.has_more) == ("msg_2", "msg_1", True)
    second = item_page(ITEMS, ItemsQuery(limit=2, after="msg_1"))
    assert [item["id"] for item in second.data] == ["msg_0"]
    assert second.has_more is False


def test_a_page_in_ascending_order_and_one_of_nothing():
    page = item_page(ITEMS, ItemsQuery(order="asc", after="msg_0"))
    assert [item["id"] for item in page.data] == ["msg_1", "msg_2"]
    assert item_page([], ItemsQuery()).first_id is None


def test_a_page_after_an_item_that_is_not_there_is_refused():
    with pytest.raises(BadRequestError, match="no item 'x'"):
        item_page(ITEMS, ItemsQuery(after="x"))


def test_the_query_of_a_page_is_read_and_bounded():
    assert parse_items_query({"limit": "5", "order": "asc", "odd": "1"}).limit == 5
    with pytest.raises(BadRequestError) as caught:
        parse_items_query({"limit": "101"})
    assert caught.value.param == "limit"


def test_what_is_kept_of_an_input_has_ids_types_and_lists():
    body = (
        b'{"model":"m","input":[{"role":"user","content":"a\\ud83d","odd":1},'
        b'{"role":"assistant","content":"b","id":"own"},'
        b'{"type":"function_call_output","call_id":"c","output":"d"},{"type":"new"}]}'
    )
    request = parse_request(body)
    assert isinstance(request.input, list)
    assert msgspec.json.decode(kept_items(request, request.input, "resp_1")) == [
        {
            "type": "message",
            "id": "msg_1i0000",
            "role": "user",
            "content": [{"type": "input_text", "text": "a\ufffd"}],
            "odd": 1,
        },
        {
            "type": "message",
            "id": "own",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "b"}],
        },
        {"type": "function_call_output", "id": "fco_1i0002", "call_id": "c", "output": "d"},
        {"type": "new", "id": "item_1i0003"},
    ]


def test_a_text_is_kept_as_a_users_message_and_no_input_as_nothing():
    request = parse_request(b'{"model":"m","input":"Hi"}')
    (item,) = msgspec.json.decode(kept_items(request, [], "resp_1"))
    assert (item["role"], item["content"]) == ("user", [{"type": "input_text", "text": "Hi"}])
    request = parse_request(b'{"model":"m","previous_response_id":"resp_0"}')
    assert kept_items(request, [], "resp_1") == b"[]"
