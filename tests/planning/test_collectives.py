"""Reading a compiled program: loops, messages, bytes moved."""

import types

import numpy as np
import pytest

from vishwam_t5x.planning import collectives, hlo, roofline, targets, traffic

MESH = {"replica": 1, "data": 2, "fsdp": 2, "tensor": 2}

# One message of each spelling, in loops whose turns are noted down, read off, and unknown.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%body.1 (p.1: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  %x.1 = f32[8,4]{1,0:T(8,128)} get-tuple-element(%p.1), index=1
  %all-gather.1 = f32[16,4]{1,0} all-gather(%x.1), channel_id=1, replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}
  ROOT %t.1 = (s32[], f32[8,4]{1,0}) tuple(%x.1, %x.1)
}

%cond.1 (p.2: (s32[], f32[8,4])) -> pred[] {
  %p.2 = (s32[], f32[8,4]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %n.2 = s32[] constant(5)
  ROOT %lt.2 = pred[] compare(%i.2, %n.2), direction=LT
}

%body.3 (p.3: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p.3 = (s32[], f32[8,4]{1,0}) parameter(0)
  %x.3 = f32[8,4]{1,0} get-tuple-element(%p.3), index=1
  %all-reduce.3 = f32[8,4]{1,0} all-reduce(%x.3), channel_id=2, replica_groups=mesh['a'=4,'b'=2] {'b'}, to_apply=%add
  ROOT %t.3 = (s32[], f32[8,4]{1,0}) tuple(%x.3, %x.3)
}

%cond.3 (p.4: (s32[], f32[8,4])) -> pred[] {
  ROOT %p.4 = pred[] parameter(0)
}

%all-reduce-scatter.1 (p.5: bf16[8,4]) -> bf16[4,4] {
  %p.5 = bf16[8,4]{1,0} parameter(0)
  %all-reduce.5 = bf16[8,4]{1,0} all-reduce(%p.5), channel_id=3, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  ROOT %ds.5 = bf16[4,4]{1,0} dynamic-slice(%all-reduce.5, %p.5), dynamic_slice_sizes={4,4}
}

%fused.6 (p.6: f32[24,8], p.7: s32[]) -> f32[1,8] {
  %p.6 = f32[24,8]{1,0} parameter(0)
  %p.7 = s32[] parameter(1)
  ROOT %ds.6 = f32[1,8]{1,0} dynamic-slice(%p.6, %p.7), dynamic_slice_sizes={1,8}
}

ENTRY %main (a: f32[8,4], b: bf16[8,4], c: f32[24,8], d: s32[]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = bf16[8,4]{1,0} parameter(1)
  %c = f32[24,8]{1,0} parameter(2)
  %d = s32[] parameter(3)
  %t = (s32[], f32[8,4]{1,0}) tuple(%a, %a)
  %while.1 = (s32[], /*index=1*/f32[8,4]{1,0}) while(%t), condition=%cond.1, body=%body.1
  %while.2 = (s32[], f32[8,4]{1,0}) while(%t), condition=%cond.3, body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
  %while.3 = (s32[], f32[8,4]{1,0}) while(%t), condition=%cond.3, body=%body.3
  %fusion.1 = bf16[4,4]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
  %collective-permute-start.1 = (f32[8,4]{1,0}, f32[8,4]{1,0}) collective-permute-start(%a), channel_id=5, source_target_pairs={{0,2},{2,0},{1,3},{3,1}}
  %slice = f32[1,8]{1,0} fusion(%c, %d), kind=kLoop, calls=%fused.6
  %near = f32[8,4]{1,0:S(1)} copy(%a)
  ROOT %out = f32[8,4]{1,0} add(%a, %near)
}
"""  # noqa: E501


def test_messages_by_kind_axis_and_turns():
    found = {(one.kind, one.axes): one for one in collectives.find(hlo.parse(PROGRAM), MESH)}
    assert set(found) == {("all-gather", "fsdp"), ("all-reduce", "tensor"),
                          ("reduce-scatter", "data"), ("collective-permute", "fsdp")}
    gather = found["all-gather", "fsdp"]
    assert (gather.group, gather.count, gather.operand_bytes) == (2, 5 + 3, 8 * 8 * 4 * 4)
    assert gather.sent_bytes == gather.operand_bytes and gather.loops_known
    assert not found["all-reduce", "tensor"].loops_known
    assert found["all-reduce", "tensor"].count == 1
    scatter = found["reduce-scatter", "data"]
    assert scatter.operand_bytes == 8 * 4 * 2 and scatter.sent_bytes == scatter.operand_bytes / 2
    assert found["collective-permute", "fsdp"].operand_bytes == 8 * 4 * 4


def test_ring_bytes():
    assert collectives.sent_bytes("all-gather", 10, 8) == 70
    assert collectives.sent_bytes("all-reduce", 80, 8) == 140
    assert collectives.sent_bytes("reduce-scatter", 80, 8) == 70
    assert collectives.sent_bytes("collective-permute", 80, 2) == 80
    assert collectives.sent_bytes("all-gather", 10, 1) == 0


def test_a_message_carried_on_by_several_fusions_counts_once():
    line = ('  %%all-gather.%d = f32[16,4]{1,0} all-gather(%%a), channel_id=7, '
            'replica_groups=[4,2]<=[8], frontend_attributes={chain_id="3"}\n')
    text = ("HloModule m\n\nENTRY %main (a: f32[8,4]) -> f32[8,4] {\n"
            "  %a = f32[8,4]{1,0} parameter(0)\n" + line % 1 + line % 2 + "}\n")
    (found,) = collectives.find(hlo.parse(text), MESH)
    assert (found.count, found.axes) == (1, "tensor")


def test_groups_that_follow_no_axis_are_unknown():
    text = ("HloModule m\n\nENTRY %main (a: f32[8,4]) -> f32[8,4] {\n"
            "  %a = f32[8,4]{1,0} parameter(0)\n"
            "  %all-reduce.1 = f32[8,4]{1,0} all-reduce(%a), replica_groups=nonsense\n}\n")
    (found,) = collectives.find(hlo.parse(text), MESH)
    assert (found.axes, found.group) == ("unknown", 8)


def test_a_transposed_mesh_of_devices():
    groups = collectives._mesh_groups("'x'=2,'y'=2", "[2,2]T(1,0)", "'x'")
    assert groups.tolist() == [[0, 1], [2, 3]]  # ids [[0, 2], [1, 3]] along the first axis


def test_memory_traffic_counts_slices_and_leaves_near_memory_out():
    module = hlo.parse(PROGRAM)
    entry = module.computations[module.entry]
    assert traffic._moved(module, entry, entry["slice"]) == 4 + 2 * 32  # index, slice in and out
    assert traffic._moved(module, entry, entry["near"]) == 128  # read only
    assert traffic._moved(module, entry, entry["out"]) == 256  # one operand is near
    assert traffic._moved(module, entry, entry["while.1"]) == 0


def test_slices_are_found_in_fusions_within_fusions():
    """A layer's part of what a stack of layers kept, read or written in a loop."""
    module = hlo.parse("""\
HloModule m

%take (stack: f32[10,8,4], i: s32[]) -> f32[8,4] {
  %stack = f32[10,8,4]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %one = f32[1,8,4]{2,1,0} dynamic-slice(%stack, %i, %i, %i), dynamic_slice_sizes={1,8,4}
  ROOT %flat = f32[8,4]{1,0} bitcast(%one)
}

%read (kept: f32[10,8,4], n: s32[], x: f32[8,4]) -> f32[8,4] {
  %kept = f32[10,8,4]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %x = f32[8,4]{1,0} parameter(2)
  %same = f32[10,8,4]{2,1,0} bitcast(%kept)
  %layer = f32[8,4]{1,0} fusion(%same, %n), kind=kLoop, calls=%take
  ROOT %sum = f32[8,4]{1,0} add(%layer, %x)
}

%write (into: f32[10,8,4], k: s32[], y: f32[8,4]) -> f32[10,8,4] {
  %into = f32[10,8,4]{2,1,0} parameter(0)
  %k = s32[] parameter(1)
  %y = f32[8,4]{1,0} parameter(2)
  %up = f32[1,8,4]{2,1,0} bitcast(%y)
  ROOT %new = f32[10,8,4]{2,1,0} dynamic-update-slice(%into, %up, %k, %k, %k)
}

ENTRY %main (a: s32[], b: f32[8,4]) -> f32[10,8,4] {
  %a = s32[] parameter(0)
  %b = f32[8,4]{1,0} parameter(1)
  %room = f32[10,8,4]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %out = f32[8,4]{1,0} fusion(%room, %a, %b), kind=kLoop, calls=%read
  ROOT %done = f32[10,8,4]{2,1,0} fusion(%room, %a, %out), kind=kLoop, calls=%write
}
""")
    entry, layer = module.computations[module.entry], 8 * 4 * 4
    assert traffic._moved(module, entry, entry["room"]) == 0
    assert traffic._moved(module, entry, entry["out"]) == 3 * layer + 4  # two read, one written
    assert traffic._moved(module, entry, entry["done"]) == 2 * layer + 4  # read, written in place


def test_of_two_branches_the_heavier_counts_and_unknown_loops_are_told():
    text = """\
HloModule m

%skip (p: f32[8,4]) -> f32[8,4] {
  ROOT %p = f32[8,4]{1,0} parameter(0)
}

%update (q: f32[8,4]) -> f32[8,4] {
  %q = f32[8,4]{1,0} parameter(0)
  ROOT %n = f32[8,4]{1,0} negate(%q)
}

ENTRY %main (i: s32[], a: f32[8,4]) -> f32[8,4] {
  %i = s32[] parameter(0)
  %a = f32[8,4]{1,0} parameter(1)
  ROOT %c = f32[8,4]{1,0} conditional(%i, %a, %a), branch_computations={%skip, %update}
}
"""
    module = hlo.parse(text)
    assert [run.name for run in module.runs()] == ["main", "update"]
    assert traffic.memory_bytes(module) == 256 and module.loops_known
    assert not hlo.parse(PROGRAM).loops_known


def chips(target):
    """Devices with coordinates, as those of a topology, the last dimension fastest."""
    sides = target.torus + (1,) * (3 - len(target.torus))
    per_chip = target.num_devices // np.prod(sides)
    return [types.SimpleNamespace(coords=place) for place in np.ndindex(*sides)
            for _ in range(per_chip)]


@pytest.mark.parametrize("name, mesh, axis, torus, share", [
    # No link leads anywhere along the third dimension, and nothing is closed to a ring.
    ("tpu-v4-8", (1, 1, 4, 1), "fsdp", (2, 2, 1), 1 / 3),
    ("tpu-v4-32", (1, 1, 16, 1), "fsdp", (2, 2, 4), 1 / 2),
    ("tpu-v4-128", (1, 1, 64, 1), "fsdp", (4, 4, 4), 1.0),
    # Sixteen of 64 chips go round two of three dimensions; half of one dimension is a line.
    ("tpu-v4-128", (1, 4, 16, 1), "fsdp", (1, 4, 4), 2 / 3),
    ("tpu-v4-512", (1, 64, 4, 1), "fsdp", (1, 1, 4), 1 / 6),
    ("tpu-v3-8", (1, 1, 8, 1), "fsdp", (2, 2, 1), 1 / 2),
    ("tpu-v3-8", (1, 4, 2, 1), "fsdp", (1, 1, 1), 1.0),  # the two devices of a chip
    ("tpu-v5e-16", (1, 1, 16, 1), "fsdp", (4, 4, 1), 1 / 2),
    ("tpu-v5e-256", (1, 16, 16, 1), "data", (16, 1, 1), 1 / 2),
    ("tpu-v5e-256", (1, 1, 256, 1), "fsdp", (16, 16, 1), 1.0)])
def test_what_a_group_has_of_the_links(name, mesh, axis, torus, share):
    target = targets.resolve(name)
    place = ("replica", "data", "fsdp", "tensor").index(axis)
    groups = np.moveaxis(np.arange(target.num_devices).reshape(mesh), place, -1)
    groups = groups.reshape(-1, mesh[place])
    listed = ",".join("{" + ",".join(map(str, group)) + "}" for group in groups)
    text = ("HloModule m\n\nENTRY %main (a: f32[8,4]) -> f32[8,4] {\n"
            "  %a = f32[1024,1024]{1,0} parameter(0)\n"
            "  %all-gather.1 = f32[1024,1024]{1,0} all-gather(%a), "
            f"replica_groups={{{listed}}}\n}}\n")
    sizes = dict(zip(("replica", "data", "fsdp", "tensor"), mesh, strict=True))
    (found,) = collectives.find(hlo.parse(text), sizes, chips(target))
    assert (found.axes, found.torus) == (axis, torus)
    assert roofline.link_share(found, target) == pytest.approx(share)
    alone = found.sent_bytes / (target.hardware.link_bandwidth * share)
    assert alone < roofline.message_seconds(found, target) < alone + 1e-4
