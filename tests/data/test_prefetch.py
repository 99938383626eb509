"""Prefetching: deterministic order, errors and the end of the data, one device and eight."""

from __future__ import annotations

import threading
import time

import jax
import numpy as np
import pytest
from data.small_data import HideSome, small_spec, small_tasks
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vishwam_t5x.core.batch import DataPosition
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.mixture import Mixture
from vishwam_t5x.data.packing import PackedBatches
from vishwam_t5x.data.prefetch import Prefetcher, local_rows


def stream(batch_size=8, repeat=True, num_records=60, cls=PackedBatches, **options):
    mixture = Mixture(small_tasks(num_records), [2, 1], seed=5, repeat=repeat)
    return cls(mixture, HideSome(), small_spec(batch_size), seed=11, **options)


def one_device():
    return NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec("data"))


def test_batches_are_those_of_the_builder_in_order():
    expected, position = stream(), DataPosition()
    with Prefetcher(stream(), one_device(), depth=3) as batches:
        for _ in range(6):
            host, batch = expected.batch(position), next(batches)
            assert (batch.start, batch.end) == (position, host.plan.end)
            assert batch.example_ids == host.plan.example_ids
            assert batch.arrays.keys() == host.arrays.keys()
            for key, array in host.arrays.items():
                np.testing.assert_array_equal(batch.arrays[key], array)
            info = batch.work
            masks = [host.arrays[key] for key in host.arrays if key.endswith("/mask")]
            assert info.num_examples == len(batch.example_ids)
            assert info.input_tokens + info.target_tokens == sum(int(m.sum()) for m in masks)
            assert 0 < info.packing <= 1 and info.wait_seconds >= 0
            position = batch.end


def test_seek_goes_back_and_forth():
    with Prefetcher(stream(), one_device()) as batches:
        first = [next(batches) for _ in range(5)]
        for index in (3, 0, 4):
            batches.seek(first[index].start)
            for batch in first[index:]:
                again = next(batches)
                assert again.end == batch.end
                np.testing.assert_array_equal(again.arrays["inputs/text/tokens"],
                                              batch.arrays["inputs/text/tokens"])


def test_finite_data_ends_with_every_example_seen():
    seen = []
    with Prefetcher(stream(repeat=False), one_device()) as batches:
        for batch in batches:
            seen += batch.example_ids
        assert sorted(seen) == list(range(90))
        with pytest.raises(StopIteration):
            next(batches)


class Failing(PackedBatches):
    calls = 0

    def batch(self, position, rows=None):
        self.calls += 1
        if self.calls == 3:
            raise UserError("the third batch is bad", got="a test", fix="none")
        return super().batch(position, rows)


def test_an_error_comes_at_its_batch_with_its_type():
    with Prefetcher(stream(cls=Failing), one_device(), depth=4) as batches:
        next(batches)
        next(batches)
        for _ in range(2):  # and it stays
            with pytest.raises(UserError, match="third batch"):
                next(batches)
        batches.seek(DataPosition())
        assert next(batches).start == DataPosition()


class Counting(PackedBatches):
    built = 0

    def batch(self, position, rows=None):
        self.built += 1
        return super().batch(position, rows)


def test_no_more_than_depth_batches_are_made_ahead():
    builder = stream(cls=Counting)
    with Prefetcher(builder, one_device(), depth=2) as batches:
        next(batches)
        deadline = time.monotonic() + 20
        while builder.built < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert builder.built == 3


def test_close_ends_the_threads():
    before = threading.active_count()
    batches = Prefetcher(stream(read_threads=2), one_device())
    next(batches)
    assert threading.active_count() > before
    batches.close()
    batches.close()
    assert threading.active_count() == before


def test_waiting_is_measured():
    class Slow(PackedBatches):
        def batch(self, position, rows=None):
            time.sleep(0.2)
            return super().batch(position, rows)

    with Prefetcher(stream(cls=Slow), one_device()) as batches:
        assert next(batches).info.wait_seconds >= 0.1


def test_depth_must_be_positive():
    with pytest.raises(UserError, match="depth"):
        Prefetcher(stream(), one_device(), depth=0)


def test_a_host_reads_only_the_rows_of_its_devices():
    """Half of the devices pretend to be another host's."""
    class HalfSharding:
        def __init__(self, sharding):
            self.sharding = sharding

        def addressable_devices_indices_map(self, shape):
            everything = self.sharding.addressable_devices_indices_map(shape)
            return dict(list(everything.items())[:1])

    assert local_rows(HalfSharding(one_device()), 8) == list(range(8))


EIGHT = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from data.test_prefetch import stream
from vishwam_t5x.core.batch import DataPosition
from vishwam_t5x.data.prefetch import Prefetcher, local_rows

devices = np.array(jax.devices()).reshape(2, 2, 2)
mesh = Mesh(devices, ("data", "fsdp", "tensor"))
sharding = NamedSharding(mesh, P(("data", "fsdp")))
reference, position = stream(), DataPosition()
with Prefetcher(stream(), {key: sharding for key in reference.spec.arrays()}) as batches:
    for _ in range(4):
        host, batch = reference.batch(position), next(batches)
        for key, array in host.arrays.items():
            got = batch.arrays[key]
            assert got.sharding == sharding and got.shape == array.shape
            np.testing.assert_array_equal(got, array)
            assert {s.data.shape[0] for s in got.addressable_shards} == {2}
        position = batch.end

# As on a host that owns four of the eight devices, every other one of a row of the mesh.
class Partial(Prefetcher):
    pass

partial = Prefetcher(stream(), sharding)
partial.close()
partial._rows = [0, 1, 4, 5]
local = stream().batch(DataPosition(), partial._rows).arrays
full = stream().batch(DataPosition()).arrays
seen = {}
make = jax.make_array_from_callback
def record(shape, sharding, callback):
    seen[shape] = [callback((slice(first, first + 2), *[slice(None)] * (len(shape) - 1)))
                   for first in (0, 4)]
    return make(shape, sharding, lambda index: np.zeros([2, *shape[1:]]))
jax.make_array_from_callback = record
partial._put({"inputs/image/input": local["inputs/image/input"]})
for first, got in zip((0, 4), seen[(8, 24, 4)]):
    np.testing.assert_array_equal(got, full["inputs/image/input"][first:first + 2])
print("ok")
"""


def test_eight_devices_as_data_2_fsdp_2_tensor_2(eight_devices):
    import helpers

    code = f"import sys; sys.path.insert(0, {str(helpers.ROOT / 'tests')!r})\n" + EIGHT
    assert eight_devices(code).strip() == "ok"
