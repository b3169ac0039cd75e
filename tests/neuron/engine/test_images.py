import pytest
import torch

from cortex.neuron.engine.engine import Engine
from cortex.neuron.engine.images import (
    SequenceImage,
    image_problem,
    place_tokens,
    position_shift,
)
from cortex.neuron.engine.loader import build_engine
from cortex.neuron.engine.protocol import (
    COMMANDS,
    LENGTH_BYTES,
    ImagePixels,
    ImageSpan,
    LoadModel,
    Submit,
    TokenEvent,
    encode_frame,
)
from cortex.neuron.engine.runner import Runner
from cortex.neuron.layers.context import Caches
from cortex.neuron.models.registry import load_causal_lm
from cortex.neuron.models.source import ModelSource
from tests.neuron.engine.building import Clock, make_scheduler
from tests.support import checkpoints
from tests.support.seeing import Seeing, picture, submit_of, words


def image(start: int, width: int, height: int, digest: bytes = bytes(32)) -> SequenceImage:
    span = ImageSpan(start=start, width=8 * width, height=8 * height, digest=digest)
    return SequenceImage(span, b"", 8)


def test_text_goes_on_from_the_longer_side_of_an_image():
    images = [image(2, 3, 2)]
    assert place_tokens(10, images).tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]
    assert position_shift(images) == -3


def test_the_shifts_of_several_images_add_up():
    images = [image(0, 1, 1), image(2, 2, 2)]
    assert place_tokens(7, images)[0].tolist() == [0, 1, 2, 2, 2, 2, 4]
    assert position_shift(images) == -2


class Eyes:
    token_side = 8
    image_token_id = 264

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        raise AssertionError("nothing is to be seen")


def spans_of(*spans: ImageSpan, prompt: int = 10) -> Submit:
    return Submit(request_id=1, prompt_ids=[264] * prompt, max_tokens=1, images=list(spans))


def span(start: int, width: int = 8, height: int = 8) -> ImageSpan:
    return ImageSpan(start=start, width=width, height=height, digest=b"d")


ONE = bytes(8 * 8 * 3)


@pytest.mark.parametrize(
    ("submit", "pixels", "problem"),
    [
        (spans_of(span(0)), [], "has 1 images, the pixels of 0 came"),
        (spans_of(), [ONE], "has 0 images, the pixels of 1 came"),
        (spans_of(span(0, width=12)), [ONE], "no multiples of 8"),
        (spans_of(span(0, height=0)), [b""], "no multiples of 8"),
        (spans_of(span(0)), [ONE[1:]], "191 bytes are not its pixels"),
        (spans_of(span(1), span(1)), [ONE, ONE], "image 1: the prompt has no place"),
        (spans_of(span(-1)), [ONE], "no place"),
        (spans_of(span(10)), [ONE], "no place"),
        (spans_of(span(9, width=16)), [ONE + ONE], "the prompt ends within it"),
    ],
)
def test_images_that_do_not_fit_the_prompt_are_refused(submit, pixels, problem):
    found = image_problem(submit, pixels, Eyes())
    assert found is not None
    assert problem in found


def test_images_that_fit_are_not_refused_but_for_a_model_that_cannot_see():
    submit = spans_of(span(0), span(9))
    assert image_problem(submit, [ONE, ONE], Eyes()) is None
    assert image_problem(submit, [ONE, ONE], None) == "the model reads text only"


def test_an_image_crosses_the_socket_in_a_frame_of_its_own():
    sent = ImagePixels(request_id=7, pixels=ONE)
    assert COMMANDS.decode(encode_frame(sent)[LENGTH_BYTES:]) == sent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("eyes")
    checkpoints.qwen3_5_wrapper(directory)
    return load_causal_lm(
        ModelSource(kind="hf", path=str(directory)),
        device=torch.device("cpu"),
        dtype=None,
        progress=lambda done, total: None,
    )


def engine_of(model, *, num_blocks=40, num_snapshots=None):
    caches = Caches.allocate(
        model.cache_spec,
        num_blocks=num_blocks,
        block_size=16,
        num_slots=4 + (num_snapshots or 0),
        dtype=torch.float32,
        device=model.device,
    )
    runner = Runner(model, caches, max_len=600, num_snapshots=num_snapshots or 0)
    runner.warm_up()
    scheduler = make_scheduler(
        num_blocks=num_blocks,
        block_size=16,
        num_slots=4,
        max_batched_tokens=64,
        prefix_cache=num_snapshots is not None,
        num_snapshots=num_snapshots,
    )
    return Engine(runner, scheduler, max_model_len=600, clock=Clock())


def send(engine: Engine, pieces, request_id: int, **fields) -> None:
    submit, pixels = submit_of(pieces, request_id, **fields)
    for each in pixels:
        engine.take_pixels(ImagePixels(request_id=request_id, pixels=each))
    engine.submit(submit)


def run(engine: Engine) -> list[TokenEvent]:
    events = engine.report().events
    while engine.has_work:
        events += engine.step().events
    return events


def tokens_of(events: list[TokenEvent], request_id: int) -> list[int]:
    return [t for each in events if each.request_id == request_id for t in each.token_ids]


def greedy(model, pieces, count: int) -> list[int]:
    seeing = Seeing(model)
    sequence = seeing.sequence(pieces)
    (logits,) = seeing.step((sequence, sequence.num_pending))
    found = [int(logits[-1].argmax())]
    while len(found) < count:
        sequence.token_ids.append(found[-1])
        (logits,) = seeing.step((sequence, 1))
        found.append(int(logits[-1].argmax()))
    return found


PROMPTS = {
    1: [*words(4), picture(64, 120), *words(5, 2)],
    2: words(23, 4),
    3: [picture(16, 48, 7), *words(3, 5), picture(64, 80, 8), *words(2, 6)],
}


def test_an_engine_answers_prompts_with_and_without_images_side_by_side(model):
    engine = engine_of(model)
    for request_id, pieces in PROMPTS.items():
        send(engine, pieces, request_id, max_tokens=8)
    sequences = [engine._sequences[each] for each in PROMPTS]
    events = run(engine)
    for request_id, pieces in PROMPTS.items():
        assert tokens_of(events, request_id) == greedy(model, pieces, 8)
    # What was seen is needed no more once a prompt is through.
    assert all(each.embeddings is None for s in sequences for each in s.images)
    assert engine._pixels == {}


def test_a_preempted_sequence_looks_at_its_image_again(model):
    engine = engine_of(model, num_blocks=19)
    for request_id in (1, 3):
        send(engine, PROMPTS[request_id], request_id, max_tokens=60)
    first, second = (engine._sequences[each] for each in (1, 3))
    waited = 0
    events: list[TokenEvent] = []
    while engine.has_work:
        events += engine.step().events
        waited += first.num_computed == 0 or second.num_computed == 0
    assert waited > 1
    for request_id in (1, 3):
        assert tokens_of(events, request_id) == greedy(model, PROMPTS[request_id], 60)


def test_prefixes_are_shared_by_equal_images_and_by_no_others(model):
    command = LoadModel(
        source=ModelSource(kind="hf", path=""), max_num_seqs=4, block_size=16, max_model_len=600
    )
    engine, loaded = build_engine(command, model, progress=lambda event: None, clock=Clock())
    assert loaded.prefix_match == "snapshot"

    def asked(request_id: int, seed: int) -> tuple[list[int], int]:
        pieces = [*words(20, 4), picture(64, 120, seed), *words(90, 2)]
        send(engine, pieces, request_id, max_tokens=6)
        events = run(engine)
        assert tokens_of(events, request_id) == greedy(model, pieces, 6)
        return tokens_of(events, request_id), max(each.cached_tokens for each in events)

    first, nothing = asked(1, 3)
    again, cached = asked(2, 3)
    assert (again, nothing) == (first, 0)
    # The image and the text around it: the snapshot is near the end of the prompt.
    assert cached > 20 + 120
    _, of_another = asked(3, 8)
    assert of_another <= 20


def ask(engine: Engine, model, pieces, request_id: int) -> int:
    """Check an answer against one without a cache; return how much of the prompt was cached."""
    send(engine, pieces, request_id, max_tokens=5)
    events = run(engine)
    assert tokens_of(events, request_id) == greedy(model, pieces, 5)
    return events[-1].cached_tokens


def test_a_prompt_with_images_goes_on_from_one_with_the_same_images(model):
    engine = engine_of(model, num_snapshots=6)
    # 37, then 8 by 15 tokens of an image, then text; states are kept at the ends of blocks.
    seen = [*words(37), picture(64, 120), *words(60, 2)]
    other = [*words(37), picture(64, 120, 4), *words(60, 2)]
    assert ask(engine, model, seen, 1) == 0
    assert ask(engine, model, [*seen[:-30], *words(50, 3)], 2) == 0
    assert ask(engine, model, [*seen[:-30], *words(50, 7)], 3) == 176
    # The same tokens with another picture: nothing of what came after its place counts.
    assert ask(engine, model, other, 4) == 0
    assert ask(engine, model, [*other[:-10], *words(40, 5)], 5) == 192
    assert ask(engine, model, seen, 6) == 192


def test_a_prompt_that_parts_within_an_image_goes_on_from_there(model):
    engine = engine_of(model, num_snapshots=6)
    big = picture(64, 240)
    # They part after the image, which is tokens 150 to 390: the second leaves the third its
    # state at the last end of a block before that.
    prompts = [[*words(150), big, *words(40, salt)] for salt in (1, 2, 3)]
    assert [ask(engine, model, pieces, i) for i, pieces in enumerate(prompts)] == [0, 0, 384]


def test_an_image_that_cannot_be_computed_ends_its_own_sequence_only(model, monkeypatch):
    engine = engine_of(model)

    def blind(pixels: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(type(model.vision), "__call__", lambda self, pixels: blind(pixels))
    for request_id in (1, 2):
        send(engine, PROMPTS[request_id], request_id, max_tokens=4)
    events = run(engine)
    (error,) = [each for each in events if each.finish == "error"]
    assert (error.request_id, error.is_refusal) == (1, False)
    assert "out of memory" in str(error.error)
    assert tokens_of(events, 2) == greedy(model, PROMPTS[2], 4)
    assert engine.report().stats.free_slots == 4


def test_a_request_whose_pixels_did_not_come_is_refused(model):
    engine = engine_of(model)
    submit, _ = submit_of(PROMPTS[1], 1)
    engine.submit(submit)
    (event,) = engine.report().events
    assert (event.finish, event.is_refusal) == ("error", True)
    assert "the pixels of 0 came" in str(event.error)


def test_pixels_of_a_refused_request_are_forgotten(model):
    engine = engine_of(model)
    send(engine, PROMPTS[1], 1, max_tokens=0)
    assert engine.report().events[0].finish == "error"
    assert engine._pixels == {}
