"""Names of hardware."""

import pytest

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.planning import targets
from vishwam_t5x.planning.gpu_description import GPUS, target_config


@pytest.mark.parametrize("name, topology, devices, hosts", [
    ("tpu-v3-8", "v3:2x2", 8, 1), ("tpu-v3-32", "v3:4x4", 32, 4), ("tpu-v4-8", "v4:2x2x1", 4, 1),
    ("v4-32", "v4:2x2x4", 16, 4), ("tpu-v4-512", "v4:4x8x8", 256, 64),
    ("TPU_v5e_16", "v5e:4x4", 16, 4), ("tpu-v5e-1", "v5e:1x1", 1, 1),
    ("tpu7x-8", "tpu7x:2x2x1", 8, 1), ("tpu-v4:4x4x8", "v4:4x4x8", 128, 32),
    ("v5litepod-16", "v5e:4x4", 16, 4), ("tpu-v5e-8", "v5e:2x4", 8, 1),
    ("tpu-v3-64", "v3:4x8", 64, 8), ("A100_40GBx2", "1x1x2", 2, 1), ("a10080gb", "1x1x1", 1, 1),
    ("h200x2", "1x1x2", 2, 1), ("gtx1650", "1x1x1", 1, 1), ("cpu:8", "", 8, 1)])
def test_names(name, topology, devices, hosts):
    target = targets.resolve(name)
    assert (target.topology, target.num_devices, target.hosts) == (topology, devices, hosts)
    assert targets.resolve(target.name) == target
    assert target.limit_bytes > 0


@pytest.mark.parametrize("name, fix", [
    ("tpu-v4-33", "tpu-v4-32"), ("h300", "h200"), ("v9-8", "v4"), ("h200x9", "h200x8"),
    ("a100", "a100-40gb or --target=a100-80gb"), ("v100x2", "v100-16gb"),
    ("cpu:0", "cpu:8"), ("tpu-v5e:2x2x2", "4x4"), ("", "tpu-v4-8")])
def test_unknown_names_are_told_apart(name, fix):
    with pytest.raises(UserError) as caught:
        targets.resolve(name)
    assert fix in caught.value.fix


def test_what_is_not_installed_is_said_with_the_fix(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    for name in ("tpu-v4-8", "gtx1650"):
        with pytest.raises(UserError, match="pip install 'vishwam_t5x\\[plan\\]'"):
            targets.check_installed(targets.resolve(name))
    targets.check_installed(targets.resolve("cpu:8"))


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_has_a_description(name):
    assert "device_memory_size" in target_config(name)
    assert target_config(f"{name}x2") == target_config(name)


def test_the_flags_of_a_file_are_kept(tmp_path, monkeypatch):
    file = tmp_path / "flags.txt"
    file.write_text("--xla_dump_to=/nowhere\n--xla_force_host_platform_device_count=3\n")
    monkeypatch.setenv("XLA_FLAGS", str(file))
    found = targets.environment(targets.resolve("cpu:8"))["XLA_FLAGS"]
    assert found == "--xla_dump_to=/nowhere --xla_force_host_platform_device_count=8"
    file.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        targets.environment(targets.resolve("cpu:8"))


def test_plans_and_launches_know_the_same_slices():
    from vishwam_t5x.launching import accelerators

    for family in accelerators.FAMILIES:
        for chips in family.chips:
            slice_ = accelerators.Tpu(family, chips)
            target = targets.resolve(slice_.cloud_name)
            assert target.num_devices == chips * family.devices_per_chip, slice_
            assert target.hosts == slice_.hosts, slice_


def test_a_target_passes_for_its_device_in_auto_precision():
    from vishwam_t5x.precision.policy import policy_by_name

    wanted = {"gtx1650": "float16", "h200": "bfloat16", "tpu-v3-8": "bfloat16", "cpu:8": "float32"}
    assert {name: policy_by_name("auto", targets.resolve(name)).name for name in wanted} == wanted
