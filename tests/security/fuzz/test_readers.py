"""The readers of strangers' files, on bytes that hypothesis makes up."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from readers import READERS, SEEDS

# What YAML is made of, so that what is drawn gets past the parser now and then.
PARTS = """unixtime end-of-epoch format files lineage size xxh3-128 model.ckpt meta pinned notes tags
of pid host : , [ ] { } - ? | > & * ! !! # ' " % @ ` ~ << ... --- &a *a !tensor !!int !!float !!set
!!binary !!python/name:os.abort null true yes .nan -.inf 0 1 -1 1e5 1.5e+3 0x1f 017 1_000 1:30
2026-01-01 ../../etc /etc float32 int64 complex64 shape data"""
WORDS = st.sampled_from(PARTS.split())
SPACE = st.sampled_from([" ", "", "\n", "\n  ", "\n- ", ": ", ", ", "\t", "\r\n", "\u2028", "\x00"])
TEXTS = st.lists(st.tuples(WORDS, SPACE), max_size=30).map(
    lambda parts: "".join(word + space for word, space in parts).encode()
)


@st.composite
def mutants(draw):
    """Draw a good file of which a few places are spoilt."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(data)))
        data[place : place + draw(st.integers(0, 8))] = draw(st.binary(max_size=6) | TEXTS)
    return bytes(data)


@pytest.mark.parametrize("name", READERS)
class TestReaders:
    """Whatever a file holds, its reader returns or raises our own error."""

    @pytest.mark.sample(1)
    @given(data=st.binary(max_size=200) | TEXTS | mutants())
    @settings(max_examples=120, deadline=None, derandomize=True)
    def test_no_bytes_make_it_do_anything_else(self, name, data):
        """A sample, the same each time."""
        READERS[name](data)

    @pytest.mark.slow
    @given(data=st.binary(max_size=2000) | TEXTS | mutants())
    @settings(max_examples=5000, deadline=None)
    def test_no_bytes_make_it_do_anything_else_in_a_long_run(self, name, data):
        """Other ones each time."""
        READERS[name](data)
