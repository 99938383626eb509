"""One mathematics under every arrangement, and what the compiled program may cost."""

import textwrap

import pytest

import helpers


def run(quickstart_cache, code, devices=8):
    out = helpers.run_python(
        "import sys; sys.path.insert(0, 'tests')\n"
        "import json, numpy as np, jax\nimport programs\n" + textwrap.dedent(code),
        devices=devices, env=quickstart_cache, timeout=1500)
    return out


def test_devices_microbatches_scan_and_remat_together(quickstart_cache):
    run(quickstart_cache, """
        plain = programs.build().losses()
        other = programs.build(mesh=dict(data=2, fsdp=2, tensor=2), microbatches=4,
                               scan_layers=True, remat_policy="full").losses()
        np.testing.assert_allclose(other, plain, rtol=2e-5)
    """)


@pytest.mark.slow
def test_every_arrangement(quickstart_cache):
    run(quickstart_cache, """
        plain = programs.build().losses()
        variants = {
            "8 devices": dict(mesh=dict(data=2, fsdp=2, tensor=2)),
            "fsdp 8": dict(mesh=dict(data=1, fsdp=8)),
            "replica 2, data 2, tensor 2": dict(mesh=dict(replica=2, data=2, tensor=2)),
            # 66 image codes do not divide by 4.
            "tensor 4": dict(mesh=dict(data=2, tensor=4), allow_uneven="replicate"),
            "scan": dict(scan_layers=True),
            "4 microbatches": dict(microbatches=4),
            "16 microbatches, scan": dict(microbatches=16, scan_layers=True),
            **{f"remat {name}": dict(remat_policy=name)
               for name in ("minimal", "full", "dots", "offload")},
            "scan, remat dots, 8 devices": dict(scan_layers=True, remat_policy="dots",
                                                mesh=dict(data=4, tensor=2)),
        }
        for name, settings in variants.items():
            found = programs.build(**settings).losses()
            print(name, found, flush=True)
            np.testing.assert_allclose(found, plain, rtol=2e-5, err_msg=name)
    """)


def test_packed_is_unpacked(quickstart_cache):
    """The same examples, many a row and one a row, have the same loss."""
    run(quickstart_cache, """
        packed = programs.build("--gin.BATCH_SIZE=4")
        alone = programs.build("--gin.BATCH_SIZE=64", pack=False)
        wanted = packed.plans[0].example_ids
        place = {row[0].example: index for index, row in enumerate(alone.plans[0].rows) if row}
        assert len(wanted) > 12 and set(wanted) <= set(place)
        together = packed.loss_sums()
        apart = alone.loss_sums(np.array([place[example] for example in wanted]))
        for modality in together:
            for field in ("loss", "z_loss", "weight", "correct"):
                np.testing.assert_allclose(
                    getattr(apart[modality], field), getattr(together[modality], field),
                    rtol=2e-5, err_msg=f"{modality} {field}")
    """, devices=1)


def test_compiled_program_is_sharded(quickstart_cache):
    """Eight devices: memory shrinks with the batch, and no activation is gathered."""
    run(quickstart_cache, """
        one = programs.build()
        eight = programs.build(mesh=dict(data=2, fsdp=2, tensor=2))
        whole, part = (p.step.memory_analysis() for p in (one, eight))
        # Four parts of the batch: a quarter of the activations, and the gathered parameters.
        parameters = sum(leaf.size * 4 for leaf in jax.tree.leaves(one.factory.abstract.params))
        assert part.temp_size_in_bytes < 0.3 * whole.temp_size_in_bytes + 3 * parameters, (
            part.temp_size_in_bytes, whole.temp_size_in_bytes)
        # Donated: every byte of the state that goes in comes out in the same place.
        for analysis in (whole, part):
            assert analysis.output_size_in_bytes - analysis.alias_size_in_bytes < 4096
        found = programs.collectives(eight.step)
        print({kind: (len(sizes), sum(sizes), max(sizes)) for kind, sizes in found.items()},
              whole.temp_size_in_bytes, part.temp_size_in_bytes, parameters)
        assert found, "an eight-device program without collectives is not sharded"
        gathered = sum(found.get("all-gather", []))
        # FSDP gathers each parameter for the forward and for the backward pass.
        assert gathered < 3 * parameters, (gathered, parameters)
        largest = max(size for sizes in found.values() for size in sizes)
        rows, length = one.batches[0]["inputs/row/index"].shape
        assert largest < rows * length * 128 * 4, "a whole activation crosses the mesh"
        assert sum(map(len, found.values())) < 250, {k: len(v) for k, v in found.items()}
    """)
