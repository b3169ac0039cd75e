import pytest

from cortex.neuron.kernels.chunks import choose_segment_chunks, plan_prefill


def test_a_sequence_is_cut_every_64_tokens():
    tables = plan_prefill([130, 0, 64])
    assert tables.chunks.tolist() == [
        [0, 64, 0, -1],
        [64, 64, 0, -1],
        [128, 2, 0, -1],
        [130, 64, 2, -1],
    ]
    assert tables.first_chunks.tolist() == [0, 3, 3, 4]
    assert tables.segments.tolist() == [[0, 0, 3, 1], [1, 3, 3, 1], [2, 3, 4, 1]]


def test_chunks_end_where_a_snapshot_is_wanted():
    tables = plan_prefill([10, 100], snapshots_at=[(1, 70), (0, 10)])
    assert tables.chunks.tolist() == [
        [0, 10, 0, 1],
        [10, 64, 1, -1],
        [74, 6, 1, 0],
        [80, 30, 1, -1],
    ]
    assert tables.num_snapshots == 2


def test_long_sequences_are_cut_into_segments():
    tables = plan_prefill([64 * 5, 64], max_segment_chunks=2)
    assert tables.segments.tolist() == [[0, 0, 2, 1], [0, 2, 4, 0], [0, 4, 5, 0], [1, 5, 6, 1]]


@pytest.mark.parametrize("snapshot", [(0, 0), (0, 11), (1, 1), (-1, 1)])
def test_a_snapshot_outside_its_sequence_is_refused(snapshot):
    with pytest.raises(ValueError, match="no snapshot after"):
        plan_prefill([10], snapshots_at=[snapshot])


def test_two_snapshots_at_one_place_are_refused():
    with pytest.raises(ValueError, match="two snapshots"):
        plan_prefill([10], snapshots_at=[(0, 5), (0, 5)])


def test_nothing_to_cut():
    tables = plan_prefill([])
    assert tables.chunks.shape == (0, 4)
    assert tables.segments.shape == (0, 4)
    assert tables.first_chunks.tolist() == [0]


@pytest.mark.parametrize(
    ("lengths", "v_heads", "expected"),
    [
        ([8192], 48, None),  # 192 blocks fill 132 multiprocessors
        ([8192], 16, 43),  # 64 blocks: three segments of 128 chunks
        ([8192] * 3, 16, None),
        ([1024], 16, None),  # 16 chunks are not worth splitting
        ([], 16, None),
        ([0], 16, None),
    ],
)
def test_segments_are_as_many_as_the_device_lacks_blocks(lengths, v_heads, expected):
    assert choose_segment_chunks(lengths, num_v_heads=v_heads, num_multiprocessors=132) == expected
