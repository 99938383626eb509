"""XLA's flags: what is unknown is left out and said, what is known and what is the user's stays."""

from __future__ import annotations

import json
import textwrap
import types

import jax
import pytest

from helpers import run, run_python, vishwam
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.parallelism import xla_flags

GONE = "--xla_gpu_enable_triton_softmax_fusion=true"  # recommended by old guides
GOOD = "--xla_gpu_enable_latency_hiding_scheduler=true"
KNOWN = "--xla_force_host_platform_device_count=2"


@pytest.fixture
def environment(tmp_path, monkeypatch):
    monkeypatch.setenv("VISHWAM_CACHE_DIR", str(tmp_path))
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "VISHWAM_XLA", "JAX_OPTIMIZATION_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def no_probe(environment):
    """For tests in which no other process may be started."""
    environment.setattr(xla_flags.subprocess, "run", lambda *_, **__: pytest.fail("a probe"))
    return environment


def test_the_probe_finds_what_this_jaxlib_does_not_know():
    assert xla_flags.unknown_flags([GOOD, GONE, KNOWN, "--xla_no_such_flag"]) == [
        GONE, "--xla_no_such_flag"]


def test_a_value_that_cannot_be_read_is_the_users_mistake():
    with pytest.raises(UserError, match="cannot read") as caught:
        xla_flags.unknown_flags(["--xla_gpu_enable_latency_hiding_scheduler=banana"])
    assert "banana" in caught.value.got


def test_no_value_is_taken_on_trust(environment):
    asked = []
    environment.setattr(xla_flags, "unknown_flags", lambda flags: asked.append(flags) or [])
    environment.setenv("XLA_FLAGS", "--xla_backend_optimization_level=banana")
    xla_flags.mend_environment()
    assert asked == [["--xla_backend_optimization_level=banana"]]


def test_the_unknown_goes_and_the_rest_stays(environment, capsys, tmp_path):
    environment.setenv("XLA_FLAGS", f"{KNOWN} {GONE} {GOOD}")
    assert xla_flags.mend_environment() == [GONE]
    assert xla_flags.os.environ["XLA_FLAGS"] == f"{KNOWN} {GOOD}"
    assert GONE in capsys.readouterr().err
    # The verdict is remembered, for this version and this text.
    (key,) = json.loads((tmp_path / "xla_flags.json").read_text())
    assert key == f"{xla_flags._version()} {KNOWN} {GONE} {GOOD}"
    environment.setattr(xla_flags.subprocess, "run", lambda *_, **__: pytest.fail("a probe"))
    environment.setenv("XLA_FLAGS", f"{KNOWN} {GONE} {GOOD}")
    assert xla_flags.mend_environment() == [GONE]
    assert GONE in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["", f"{KNOWN} --xla_backend_optimization_level=1",
                                   "/a/file/of/flags", "--xla_dump_to='a"])
def test_nothing_is_tried_where_nothing_can_be_wrong(no_probe, flags):
    no_probe.setenv("XLA_FLAGS", flags)
    assert xla_flags.mend_environment() == [] and xla_flags.os.environ["XLA_FLAGS"] == flags


def test_a_broken_memory_is_no_obstacle(environment, tmp_path):
    (tmp_path / "xla_flags.json").write_text("{")
    environment.setenv("XLA_FLAGS", GOOD)
    assert xla_flags.mend_environment() == []
    environment.setenv("VISHWAM_CACHE_DIR", str(tmp_path / "xla_flags.json"))  # Not a folder.
    environment.setenv("XLA_FLAGS", GOOD)
    assert xla_flags.mend_environment() == []


def test_a_verb_survives_the_flag_that_ends_a_process(tmp_path):
    env = {"XLA_FLAGS": GONE, "VISHWAM_CACHE_DIR": str(tmp_path)}
    plain = run(["-c", xla_flags._PROBE], env=env)
    assert plain.returncode != 0 and "Unknown flag" in plain.stderr  # What it would have been.
    done = vishwam("forward", "--gin_file=nothing.gin", env=env)
    assert done.returncode == 2 and GONE in done.stderr and "nothing.gin" in done.stderr


def test_looking_costs_no_import_of_jax():
    run_python("""
        import sys
        from vishwam_t5x.parallelism import xla_flags
        assert "jax" not in sys.modules and "numpy" not in sys.modules
        """)


def names(platform, devices=8, kind="", **variables):
    return [setting.name for setting in xla_flags.settings(platform, devices, variables, kind)]


def test_settings_are_for_several_devices():
    assert names("gpu") == ["jax_optimization_level"]
    assert "xla_tpu_overlap_compute_collective_tc" in names("tpu")
    assert not names("cpu") and not names("tpu", devices=1) and not names("gpu", devices=1)


def test_what_a_kind_does_unasked_it_is_not_told(no_probe):
    assert set(names("tpu", kind="TPU v5 lite")) == {
        "xla_jf_spmd_threshold_for_windowed_einsum_mib",
        "xla_tpu_enable_data_parallel_all_reduce_opt",
        "xla_tpu_data_parallel_opt_different_sized_ops"}
    for kind in ("TPU v3", "TPU v4", "TPU v5", "TPU v6 lite", "a new one"):
        assert names("tpu", kind=kind) == names("tpu")
    asked = {}
    no_probe.setattr(xla_flags, "accepted", lambda options, device: asked.update(options) or {})
    lite = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite", process_index=0)
    xla_flags.compiler_options([lite, lite])
    assert list(asked) == names("tpu", kind="TPU v5 lite")


def test_every_setting_has_its_reason():
    for settings in xla_flags.SETTINGS.values():
        assert len({setting.name for setting in settings}) == len(settings)
        assert all(len(setting.reason) > 20 for setting in settings)


def test_the_user_wins():
    one = "xla_tpu_overlap_compute_collective_tc"
    assert one not in names("tpu", LIBTPU_INIT_ARGS=f"--{one}=false")
    assert one not in names("tpu", XLA_FLAGS=f"{KNOWN} --{one}=false")
    assert len(names("tpu", LIBTPU_INIT_ARGS=f"--{one}=false")) == len(names("tpu")) - 1
    assert not names("gpu", JAX_OPTIMIZATION_LEVEL="O0")
    assert not names("tpu", VISHWAM_XLA="off")


def test_an_unknown_compiler_option_is_left_out_and_said(caplog):
    options = {"xla_gpu_enable_latency_hiding_scheduler": True, "xla_tpu_no_such": True}
    with caplog.at_level("WARNING"):
        kept = xla_flags.accepted(options, jax.devices("cpu")[0])
    assert kept == {"xla_gpu_enable_latency_hiding_scheduler": True}
    assert "xla_tpu_no_such=True is left out" in caplog.text


def test_the_optimization_level_is_one_that_jax_knows(environment):
    before = jax.config.jax_optimization_level
    gpu = types.SimpleNamespace(platform="gpu", process_index=0)
    try:
        assert xla_flags.compiler_options([gpu, gpu]) == {}
        assert jax.config.jax_optimization_level == "O1"
    finally:
        jax.config.update("jax_optimization_level", before)


def test_the_mesh_decides_what_is_asked_of_the_compiler():
    """On CPU devices there is nothing by default; a setting for them is tried and kept, or not."""
    run_python("""
        import jax
        from vishwam_t5x.parallelism import xla_flags
        from vishwam_t5x.parallelism.xla_flags import Setting
        xla_flags.SETTINGS = {"cpu": (
            Setting("xla_cpu_enable_fast_min_max", True, "a test"),
            Setting("xla_tpu_no_such", True, "a test"))}
        kept = xla_flags.compiler_options(jax.devices())
        assert kept == {"xla_cpu_enable_fast_min_max": True}, kept
        """, devices=2)


@pytest.mark.slow
def test_libtpu_knows_ours():
    """Without a TPU: libtpu compiles for one that is not there."""
    pytest.importorskip("libtpu")
    code = """
        from jax.experimental import topologies
        from vishwam_t5x.parallelism import xla_flags
        megacore = dict(chip_config_name="megacore", chips_per_host_bounds=[2, 2, 1],
                        num_slices=1, wrap=[False] * 3)
        every = {s.name: s.value for s in xla_flags.settings("tpu", 8, {})}
        for name, options in (("v3:2x2", {}), ("v4:2x2x2", megacore), ("v5e:2x4", {}),
                              ("v6e:2x4", {})):
            devices = topologies.get_topology_desc(name, "tpu", **options).devices
            kind = devices[0].device_kind
            wanted = {s.name: s.value for s in xla_flags.settings("tpu", 8, {}, kind)}
            assert (wanted == every) != name.startswith("v5e"), kind
            assert xla_flags.compiler_options(devices) == wanted, kind
            assert xla_flags.accepted({**every, "xla_tpu_no_such": True}, devices[0]) == every, kind
        """
    done = run(["-c", textwrap.dedent(code)], env={"TPU_SKIP_MDS_QUERY": "1"})
    if "lockfile" in done.stderr:
        pytest.skip("another process has libtpu")
    assert done.returncode == 0, done.stderr
