"""What the world does to a run: kills it in a save, fills the disk, changes the devices."""

import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time

import process_groups
import pytest
from checkpoint_states import abstract, assert_equal, make_state

import helpers
from vishwam_t5x.checkpointing.manager import Checkpoints
from vishwam_t5x.checkpointing.policy import CheckpointConfig

HERE = os.path.dirname(os.path.abspath(__file__))
PRELUDE = f"import sys; sys.path.insert(0, {HERE!r})\n" + """
import logging, os, sys
import jax, jax.numpy as jnp, numpy as np
logging.basicConfig(level=logging.WARNING)
from checkpoint_states import abstract, assert_equal, make_state
from vishwam_t5x.checkpointing.manager import Checkpoints
from vishwam_t5x.checkpointing.policy import CheckpointConfig

def checkpoints(model_dir, keep=None, **options):
    return Checkpoints(os.path.join(model_dir, "checkpoints"), CheckpointConfig(1, keep=keep),
                       **options)

"""

# Saves without pause; what it restores must be exactly what its step says. Of the save that argv
# names it says that all is written and nothing committed, and stays there.
ENDLESS = PRELUDE + """
import time
saves, stays = 0, int(sys.argv[2])

def stay():
    global saves
    saves += 1
    if saves == stays:
        print("inside", 0, flush=True)
        time.sleep(1000)

with checkpoints(sys.argv[1], keep=2, before_commit=stay) as run:
    state = run.restore(abstract(make_state(0, width=256)))
    step = 0
    if state is not None:
        step = run.restored_step
        assert_equal(state, make_state(step, width=256))
    print("restored", step, flush=True)
    while True:
        step += 1
        run.save(step, make_state(step, width=256))
        if run.latest_step() is not None:
            print("saved", run.latest_step(), flush=True)
"""


class Saving:
    """A process that runs ENDLESS, and what it says."""

    def __init__(self, folder, stays):
        self._log = folder / "stderr.txt"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", ENDLESS, str(folder), str(stays)],
                env=helpers.environment(), cwd=helpers.ROOT, stdout=subprocess.PIPE, stderr=log,
                text=True)
        self._lines = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.saved = 0

    def _read(self):
        for line in self.process.stdout:
            self._lines.put(line.split())
        self._lines.put(None)

    def _next(self):
        line = self._lines.get(timeout=240)
        if line is not None and line[0] == "saved" and len(line) == 2:
            self.saved = int(line[1])
        return line

    def until(self, word, above=-1):
        while (line := self._next()) is not None:
            if line[0] == word and int(line[1]) > above:
                return int(line[1])
        raise AssertionError(self._log.read_text())

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        while self._next() is not None:
            pass


def checkpoints(model_dir):
    return Checkpoints(model_dir / "checkpoints", CheckpointConfig(1, keep=None))


def kill_in_the_middle(tmp_path, kills, seed):
    """By turns within a save, when all is written and nothing committed, and anywhere."""
    chance = random.Random(seed)
    seen, known = [], 0
    for number in range(kills + 1):
        within = number % 2 == 0
        saving = Saving(tmp_path, 3 if within else 0)
        seen.append(saving.until("restored"))
        # Nothing that was seen on disk before the kill is lost.
        assert seen[-1] >= known, (seen, known)
        saving.until("saved", above=seen[-1])
        if within:
            saving.until("inside")
        else:
            time.sleep(chance.uniform(0.0, 0.7))  # for the variety: whenever it falls will do
        saving.kill()
        known = max(known, saving.saved)
        if within:
            assert any("orbax-checkpoint-tmp" in name
                       for name in os.listdir(tmp_path / "checkpoints"))
    assert seen[-1] > seen[1] > 0


def test_killed_while_saving(tmp_path):
    kill_in_the_middle(tmp_path, kills=3, seed=1)


@pytest.mark.slow
def test_killed_twenty_times(tmp_path):
    kill_in_the_middle(tmp_path, kills=20, seed=2)


FULL = PRELUDE + """
import resource
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

with checkpoints(sys.argv[1]) as run:
    run.save(1, make_state(1, width=256))
    assert run.wait()
    limit(100_000)
    held = run.save(2, make_state(2, width=256))
    assert not run.wait() and run.failed_saves == 1
    assert run.all_steps() == [1], run.all_steps()
    assert not run.should_save(2) and run.should_save(3)
    run.save(3, make_state(3, width=256))
    assert not run.wait() and run.failed_saves == 2
    limit(resource.RLIM_INFINITY)
    # As if a file of the failed save had been written after that was swept.
    late = os.path.join(sys.argv[1], "checkpoints", "3.orbax-checkpoint-tmp", "d")
    os.makedirs(late, exist_ok=True)
    run.save(4, make_state(4, width=256))
    assert run.wait()
    for step in (4, 1):
        assert_equal(run.restore(abstract(make_state(0, width=256)), step=step),
                     make_state(step, width=256))
print("left", sorted(os.listdir(os.path.join(sys.argv[1], "checkpoints"))))
"""


def test_files_too_large_for_the_disk(tmp_path):
    done = helpers.run(["-c", FULL, str(tmp_path)])
    assert done.returncode == 0, done.stderr
    assert "left ['1', '4.abandoned']" in done.stdout
    assert "CHECKPOINT NOT SAVED at step 2" in done.stderr
    assert "the last checkpoint on disk is 1" in done.stderr


NO_SPACE = PRELUDE + """
place = sys.argv[1]
with checkpoints(place) as run:
    run.save(1, make_state(1, width=128))
    assert run.wait()
    with open(os.path.join(place, "ballast"), "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 65536)
        except OSError:
            pass
    run.save(2, make_state(2, width=128))
    assert not run.wait()
    os.remove(os.path.join(place, "ballast"))
    run.save(3, make_state(3, width=128))
    assert run.wait()
    assert run.all_steps() == [1, 3]
    assert_equal(run.restore(abstract(make_state(0, width=128)), step=3),
                 make_state(3, width=128))
    assert_equal(run.restore(abstract(make_state(0, width=128)), step=1),
                 make_state(1, width=128))
"""


def test_no_space_left_on_device(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)],
                             capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no small file system to fill: {mounted.stderr.strip()}")
    try:
        done = helpers.run(["-c", NO_SPACE, str(tmp_path)])
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert done.returncode == 0, done.stderr
    assert "CHECKPOINT NOT SAVED at step 2" in done.stderr


ON_MESH = PRELUDE + """
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
folder, axes, shape, take, save = sys.argv[1], sys.argv[2].split(","), sys.argv[3], *sys.argv[4:]
mesh = Mesh(np.array(jax.devices()).reshape([int(n) for n in shape.split("x")]), axes)

def place(ndim):
    return NamedSharding(mesh, P(*axes[:ndim]) if ndim == 2 else P())

with checkpoints(folder) as run:
    state = run.restore(abstract(make_state(0), place))
    assert run.restored_step == int(take)
    kernel = state["params"]["encoder"]["layers_0"]["mlp"]["wi"]["kernel"]
    assert kernel.sharding == place(2) and len(kernel.addressable_shards) == len(jax.devices())
    assert_equal(state, make_state(1))
    run.save(int(save), state)
    assert run.wait()
"""


def test_from_one_device_to_eight_to_two(tmp_path):
    """Each restores bit for bit what the one before saved from other devices."""
    with checkpoints(tmp_path) as run:
        run.save(1, make_state(1))
    for devices, axes, shape, take, save in (
            (8, "data,tensor", "4x2", "1", "2"), (2, "fsdp", "2", "2", "3")):
        done = helpers.run(["-c", ON_MESH, str(tmp_path), axes, shape, take, save],
                           devices=devices)
        assert done.returncode == 0, done.stderr


def test_of_what_devices_hold_alike_one_is_copied(eight_devices):
    eight_devices("""
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from vishwam_t5x.checkpointing.writing import snapshot
mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
value = np.arange(16 * 8, dtype=np.float32).reshape(16, 8)
overwrite = jax.jit(lambda array: array * 0 - 1, donate_argnums=0)
for spec, pieces in ((P(), 1), (P("fsdp"), 2), (P(None, "data"), 2), (P("tensor", "fsdp"), 4),
                     (P(("fsdp", "data")), 4), (P(("data", "tensor"), "fsdp"), 8)):
    array = jax.device_put(value, NamedSharding(mesh, spec))
    copy = snapshot({"w": array})["w"]
    array = overwrite(array)
    assert len(copy.addressable_shards) == pieces, (spec, len(copy.addressable_shards))
    assert copy.sharding.memory_kind == "pinned_host"
    assert sum(shard.data.size for shard in copy.addressable_shards) == value.size
    np.testing.assert_array_equal(np.asarray(copy), value)
""")


def test_params_onto_a_mesh_restacked(tmp_path, eight_devices):
    """Unrolled and saved on one device, restored into a scanned model split over eight."""
    with checkpoints(tmp_path) as run:
        run.save(1, make_state(1))
    eight_devices(PRELUDE + f"""
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from vishwam_t5x.checkpointing.restore import restore_params
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
kernel = jax.ShapeDtypeStruct((16, 3, 32), jnp.float32,
                              sharding=NamedSharding(mesh, P("fsdp", None, "tensor")))
scale = jax.ShapeDtypeStruct((16, 3), jnp.float32, sharding=NamedSharding(mesh, P("tensor")))
params, report = restore_params({str(tmp_path)!r}, {{"encoder": {{"encoder": {{
    "mlp": {{"wi": {{"kernel": kernel}}}}, "norm": {{"scale": scale}}}}}}}})
saved = make_state(1)["params"]["encoder"]
got = params["encoder"]["encoder"]
for leaf, want in ((got["mlp"]["wi"]["kernel"], kernel), (got["norm"]["scale"], scale)):
    assert leaf.sharding == want.sharding
for i in range(3):
    np.testing.assert_array_equal(got["mlp"]["wi"]["kernel"][:, i],
                                  saved[f"layers_{{i}}"]["mlp"]["wi"]["kernel"])
    np.testing.assert_array_equal(got["norm"]["scale"][:, i],
                                  saved[f"layers_{{i}}"]["norm"]["scale"])
""")


TWO_PROCESSES = PRELUDE + """
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
folder, port, number = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(number))
assert jax.process_count() == 2 and len(jax.devices()) == 4
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "fsdp"))

def place(ndim):
    return NamedSharding(mesh, P("fsdp", "data") if ndim == 2 else P())

def globally(state):
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, np.ndarray) else
                        jax.make_array_from_callback(leaf.shape, place(leaf.ndim),
                                                     lambda index: np.asarray(leaf)[index]), state)

with checkpoints(folder) as run:
    run.restore(abstract(make_state(0), place))
    first = run.restored_step or 0
    for step in range(first + 1, first + 4):
        # Steps with collectives of their own go on while the save before is written.
        state = globally(make_state(step))
        total = jax.jit(lambda tree: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(tree)))(
            state["params"])
        assert run.should_save(step) and run.save(step, state)
    assert run.wait() and run.latest_step() == first + 3
    got = run.restore(abstract(make_state(0), place))
    kernel = got["params"]["encoder"]["layers_2"]["mlp"]["wi"]["kernel"]
    want = make_state(first + 3)["params"]["encoder"]["layers_2"]["mlp"]["wi"]["kernel"]
    for shard in kernel.addressable_shards:
        np.testing.assert_array_equal(shard.data, want[shard.index])
    if jax.process_index() == 0:
        print("damage", flush=True)
        path = os.path.join(folder, "checkpoints", str(first + 3), "manifest.json")
        with open(path) as file:
            text = file.read()
        with open(path, "w") as file:
            file.write(text[:-20])
    from vishwam_t5x.core.distributed import barrier
    barrier("damaged")
    got = run.restore(abstract(make_state(0), place))
    assert run.restored_step == first + 2, run.restored_step
    # A file that one process alone cannot read: all go back to the next older checkpoint.
    import orbax.checkpoint as ocp
    whole = ocp.PyTreeCheckpointHandler.restore

    def fails_once(self, directory, *args, **kwargs):
        if str(directory).endswith(str(first + 2)) and jax.process_index() == 1:
            raise OSError("no route to the file server")
        return whole(self, directory, *args, **kwargs)

    ocp.PyTreeCheckpointHandler.restore = fails_once
    got = run.restore(abstract(make_state(0), place))
    assert run.restored_step == first + 1, run.restored_step
"""


def test_two_processes_then_one(tmp_path):
    port = process_groups.free_port()
    running = [subprocess.Popen(
        [sys.executable, "-c", TWO_PROCESSES, str(tmp_path), str(port), str(number)],
        env=helpers.environment(2), cwd=helpers.ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True) for number in (0, 1)]
    outputs = [process.communicate(timeout=300) for process in running]
    assert all(process.returncode == 0 for process in running), outputs
    with checkpoints(tmp_path) as run:
        assert_equal(run.restore(abstract(make_state(0))), make_state(1))
        assert run.restored_step == 1
