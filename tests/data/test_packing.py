import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diladiff_jax.data.errors import DataError
from diladiff_jax.data.packing import pack

EOT = 99
documents = st.lists(
    st.lists(st.integers(0, 50), max_size=20).map(lambda x: np.array(x, np.int32)), max_size=12
)
lengths = st.integers(2, 9)


@settings(max_examples=200, deadline=None)
@given(documents, lengths)
def test_packed_rows_are_the_stream_without_its_remainder(docs, length):
    stream = np.concatenate([np.append(d, EOT) for d in docs]) if docs else np.empty(0, np.int32)
    rows = list(pack(iter(docs), length, EOT, "packed"))
    whole = len(stream) // length * length
    assert len(rows) == len(stream) // length
    assert all(r.shape == (length,) and r.dtype == np.int32 for r in rows)
    np.testing.assert_array_equal(np.concatenate([*rows, []]), stream[:whole])


@settings(max_examples=200, deadline=None)
@given(documents, lengths)
def test_document_rows_hold_one_document_each_and_eot_after_it(docs, length):
    rows = iter(list(pack(iter(docs), length, EOT, "document")))
    for doc in docs:
        mine = [next(rows) for _ in range(math.ceil(len(doc) / length))]
        flat = np.concatenate([*mine, []])
        np.testing.assert_array_equal(flat[: len(doc)], doc)
        assert (flat[len(doc) :] == EOT).all() and len(flat) - len(doc) < length
    assert next(rows, None) is None


def test_rows_do_not_share_memory():
    first, second = pack([np.arange(7)], 4, EOT, "packed")
    before = first.copy()
    second[:] = -1
    np.testing.assert_array_equal(first, before)


@pytest.mark.parametrize("length, mode", [(1, "packed"), (8, "dense")])
def test_bad_settings_are_rejected_in_one_line(length, mode):
    with pytest.raises(DataError, match="expected") as error:
        list(pack([], length, EOT, mode))
    assert "\n" not in str(error.value)
