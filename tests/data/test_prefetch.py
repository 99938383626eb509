"""Prefetching: deterministic order, errors and the end of the data, one device and eight."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import process_groups
import pytest
from data.small_data import HideSome, small_spec, small_tasks
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import helpers
from vishwam_t5x.core.batch import DataPosition
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import prefetch
from vishwam_t5x.data.mixture import Mixture
from vishwam_t5x.data.packing import PackedBatches
from vishwam_t5x.data.prefetch import Prefetcher


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
    built = taken = most_ahead = 0

    def batch(self, position, rows=None):
        self.built += 1
        self.most_ahead = max(self.most_ahead, self.built - self.taken)
        return super().batch(position, rows)


def test_no_more_than_depth_batches_are_made_ahead():
    builder = stream(cls=Counting)
    with Prefetcher(builder, one_device(), depth=2) as batches:
        for _ in range(10):
            builder.taken += 1
            next(batches)
            deadline = time.monotonic() + 60
            while builder.built < builder.taken + 2:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    assert builder.most_ahead == 2


def test_close_ends_the_threads():
    before = set(threading.enumerate())
    batches = Prefetcher(stream(read_threads=2), one_device())
    next(batches)
    begun = set(threading.enumerate()) - before
    assert begun
    batches.close()
    batches.close()
    assert not any(thread.is_alive() for thread in begun)
    with pytest.raises(AssertionError, match="closed"):
        next(batches)


def test_waiting_is_measured(monkeypatch):
    clock = iter([10.0, 13.0])
    monkeypatch.setattr(prefetch, "time", types.SimpleNamespace(perf_counter=clock.__next__))
    with Prefetcher(stream(), one_device()) as batches:
        assert next(batches).info.wait_seconds == 3.0


def test_depth_must_be_positive():
    with pytest.raises(UserError, match="depth"):
        Prefetcher(stream(), one_device(), depth=0)


EIGHT = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from data.test_prefetch import stream
from vishwam_t5x.core.batch import DataPosition
from vishwam_t5x.data.prefetch import Prefetcher

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

print("ok")
"""


def test_eight_devices_as_data_2_fsdp_2_tensor_2(eight_devices):
    code = f"import sys; sys.path.insert(0, {str(helpers.ROOT / 'tests')!r})\n" + EIGHT
    assert eight_devices(code).strip() == "ok"


HOST = """
import sys
sys.path.insert(0, {tests!r})
import jax, numpy as np
jax.distributed.initialize("localhost:{port}", 2, {process})
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from data.test_prefetch import Counting, stream
from vishwam_t5x.core.batch import DataPosition
from vishwam_t5x.data.packing import PackedBatches
from vishwam_t5x.data.prefetch import Prefetcher

# Devices of the two processes take turns along the rows: this host's rows are not neighbours.
devices = sorted(jax.devices(), key=lambda d: (d.id % 2, d.process_index))
sharding = NamedSharding(Mesh(np.array(devices), ("data",)), P("data"))
asked = []

class Watched(PackedBatches):
    def batch(self, position, rows=None):
        asked.append(rows)
        return super().batch(position, rows)

reference, position = stream(), DataPosition()
with Prefetcher(stream(cls=Watched), sharding) as batches:
    for _ in range(3):
        host, batch = reference.batch(position), next(batches)
        assert batch.end == host.plan.end and batch.example_ids == host.plan.example_ids
        for key, array in host.arrays.items():
            got = batch.arrays[key]
            assert got.shape == array.shape and len(got.addressable_shards) == 2
            for shard in got.addressable_shards:
                np.testing.assert_array_equal(shard.data, array[shard.index])
        position = batch.end
    total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(sharding.mesh, P()))(
        batch.arrays["inputs/text/tokens"])
    assert int(total) == host.arrays["inputs/text/tokens"].sum()
print(asked[0])
"""


def test_two_processes_read_their_own_rows_and_hold_one_batch():
    port = process_groups.free_port()
    tests = str(helpers.ROOT / "tests")
    processes = [subprocess.Popen(
        [sys.executable, "-c", HOST.format(tests=tests, port=port, process=process)],
        env=helpers.environment(devices=2), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True) for process in range(2)]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    rows = [json.loads(out.strip().splitlines()[-1]) for out, _ in outputs]
    assert rows == [[0, 1, 4, 5], [2, 3, 6, 7]]
