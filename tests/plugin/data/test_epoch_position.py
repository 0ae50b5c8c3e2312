"""How far an epoch is stays the same when ranks, batch sizes or lengths become others."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_sbckpt.plugin.data.epoch_position import EpochPosition

sizes, ranks, samples = st.integers(1, 9), st.integers(1, 5), st.integers(1, 99)


def divided(count: int, batch_size: int, ranks: int) -> int:
    """Return how many batches each rank has of so many samples."""
    return -(-count // (batch_size * ranks))


@given(sizes, ranks, sizes, ranks, samples, st.data())
def test_position_holds_no_sample_that_was_not_trained_on(then, before, now, after, count, data):
    """And leaves a batch before the validation, unless the epoch was over."""
    lengths = divided(count, then, before), divided(count, now, after)
    done = data.draw(st.integers(0, lengths[0]))
    position = EpochPosition(done, then, before, lengths[0])
    found = position.batches_with(batch_size=now, ranks=after, length=lengths[1])
    if position.is_over:
        assert found == lengths[1]
    else:
        assert 0 <= found < lengths[1]
        assert found * now * after <= position.samples


@given(sizes, ranks, st.integers(0, 20), st.none() | st.integers(0, 20))
def test_position_in_an_unchanged_epoch_is_the_same(size, ranks, done, length):
    """Whatever length was told."""
    position = EpochPosition(done, size, ranks, length)
    assert position.batches_with(batch_size=size, ranks=ranks, length=length) == done


@given(st.integers(0, 20), st.integers(0, 20), st.none() | st.integers(1, 20))
def test_position_without_batch_sizes_is_a_part_of_the_length(done, length, now):
    """As near as is known: nothing is known of two lengths of which one is not there."""
    position = EpochPosition(done, None, 1, length)
    found = position.batches_with(batch_size=None, ranks=2, length=now)
    if now is None:
        assert found == done
    elif not position.is_over:
        assert found == min(done * now // length, now - 1)
