"""T5X's checkpoints: read as they are, written as T5X writes them, damage and strangers refused."""

import json
import shutil

import jax
import ml_dtypes
import msgpack
import numpy as np
import pytest
import t5x_folders
import tensorstore as ts
from etils import epath
from jax.sharding import PartitionSpec

from vishwam_t5x.checkpointing.convert import conversion, names, report, t5x, t5x_legacy
from vishwam_t5x.checkpointing.restore import open_source, restore_params
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.core.trees import flatten_names, unflatten_names

EMBEDDING, LOGITS = names.EMBEDDING, names.LOGITS


def params():
    """The trained parameters under our names."""
    renamed = {"token_embedder/embedding": EMBEDDING, "decoder/logits_dense/kernel": LOGITS}
    return {renamed.get(name.removeprefix("target/"), name.removeprefix("target/")): array
            for name, array in t5x_folders.state().items() if name.startswith("target/")}


def wanted(arrays):
    return unflatten_names({name: jax.ShapeDtypeStruct(array.shape, array.dtype)
                            for name, array in arrays.items()})


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A legacy MODEL_DIR, in which every file that we have of T5X itself is T5X's."""
    folder = tmp_path_factory.mktemp("t5x")
    place = t5x_folders.write(t5x_folders.state(), folder / "checkpoint_300")
    for name, content in t5x_folders.real_files().items():
        (place / name).write_bytes(content)
    (folder / "checkpoint_400.tmp-1764").mkdir()  # a save that was killed
    return folder


@pytest.fixture
def copy(model_dir, tmp_path):
    return shutil.copytree(model_dir / "checkpoint_300", tmp_path / "checkpoint_300")


def test_files_are_those_that_t5x_writes(tmp_path):
    written = t5x_folders.files(t5x_folders.write(t5x_folders.state(), tmp_path / "c"))
    real = t5x_folders.real_files()
    made_up = "state.param_states.decoder.decoder_norm.scale.v/0"
    assert {name: written[name] for name in real if name != made_up} == {
        name: content for name, content in real.items() if name != made_up}
    assert len(written) == 181  # as in T5X's folder: ninety arrays of two files, and the tree


@pytest.mark.parametrize("way", ["", "checkpoint_300", "latest"])
def test_parameters_of_a_legacy_checkpoint(model_dir, way):
    found, report = restore_params(model_dir / way, wanted(params()))
    for name, array in flatten_names(found).items():
        np.testing.assert_array_equal(np.asarray(array), params()[name])
    assert report.step == 300 and len(report.matched) == 52 and not report.extra
    assert report.path.endswith("checkpoint_300")


def test_a_model_with_stacked_layers_reads_it_too(model_dir):
    kernel = "encoder/layers_{}/mlp/wi_0/kernel"
    stack = np.stack([params()[kernel.format(i)] for i in range(2)], 1)
    found, _ = restore_params(model_dir, wanted({"encoder/encoder/mlp/wi_0/kernel": stack}))
    np.testing.assert_array_equal(found["encoder"]["encoder"]["mlp"]["wi_0"]["kernel"], stack)


@pytest.mark.parametrize("database", [True, False])
def test_orbax_checkpoints(tmp_path, database):
    some = {name: array for name, array in t5x_folders.state().items()
            if "decoder_norm" in name or "token_embedder" in name or name == "state/step"}
    t5x_folders.write_orbax(some, tmp_path / "checkpoint_300", database=database)
    opened = conversion.open_any(tmp_path)
    assert opened.kind == t5x.ORBAX and opened.step == 300 and not opened.homeless
    for name, own in opened.own.items():
        part = tuple(slice(0, length) for length in some[own].shape)
        np.testing.assert_array_equal(opened.source.read_part(name, part), some[own])


@pytest.mark.parametrize("writer", ["orbax, zarr3", "another, zarr2 with a fill value"])
def test_a_lost_chunk_is_not_read_as_zeros(tmp_path, writer):
    """Its `_METADATA` says that every chunk was written, those of the fill value too."""
    name, place = "target/decoder/decoder_norm/scale", tmp_path / "checkpoint_1"
    scale = np.zeros(6, np.float32)
    t5x_folders.write_orbax({name: scale}, place, database=False, zarr3="zarr3" in writer)
    folder = place / "state" / name.replace("/", ".")
    if "zarr2" in writer:
        header = json.loads((folder / ".zarray").read_text())
        (folder / ".zarray").write_text(json.dumps({**header, "fill_value": 0.0}))
    ours = wanted({"decoder/decoder_norm/scale": scale})
    found, _ = restore_params(tmp_path, ours)
    np.testing.assert_array_equal(found["decoder"]["decoder_norm"]["scale"], scale)
    (folder / ("c/0" if "zarr3" in writer else "0")).unlink()
    with pytest.raises(UserError, match="damaged") as error:
        restore_params(tmp_path, ours)
    assert f"array '{name}'" in error.value.got and "chunk {0}" in error.value.got


def written_without_zeros(tmp_path, driver, fill_value):
    """A checkpoint as Orbax wrote it in 2023: TensorStore leaves out chunks of the fill value."""
    name, place = "target/decoder/decoder_norm/scale", tmp_path / "checkpoint_1"
    scale = np.array([0, 0, 0, 0, 5, 6], np.float32)
    t5x_folders.write_orbax({name: scale}, place, database=False, zarr3=driver == "zarr3")
    tree = place / "state" / "_METADATA"
    said = json.loads(tree.read_text())
    assert said.pop("store_array_data_equal_to_fill_value") is True
    tree.write_text(json.dumps(said))
    folder = place / "state" / name.replace("/", ".")
    shutil.rmtree(folder)
    header = {"chunks": [2], "dtype": "<f4"} if driver == "zarr" else {
        "data_type": "float32", "chunk_grid": {
            "name": "regular", "configuration": {"chunk_shape": [2]}}}
    ts.open({"driver": driver, "kvstore": {"driver": "file", "path": f"{folder}/"},
             "metadata": {"shape": [6], "fill_value": fill_value, **header}},
            create=True).result().write(scale).result()
    return folder, scale


@pytest.mark.parametrize("driver", ["zarr", "zarr3"])
def test_chunks_of_zeros_that_were_left_out_are_zeros(tmp_path, driver, caplog):
    folder, scale = written_without_zeros(tmp_path, driver, 0.0)
    assert len([path for path in folder.rglob("*") if path.is_file()]) == 2  # one, and the header
    ours = wanted({"decoder/decoder_norm/scale": scale})
    found, _ = restore_params(tmp_path, ours)
    np.testing.assert_array_equal(found["decoder"]["decoder_norm"]["scale"], scale)
    assert "2 of 3 chunks of array 'target/decoder/decoder_norm/scale'" in caplog.text
    chunk = folder / ("c/2" if driver == "zarr3" else "2")
    chunk.write_bytes(b"\0" * 5)  # another fault is one all the same
    with pytest.raises(UserError, match="damaged"):
        restore_params(tmp_path, ours)


def test_without_a_fill_value_a_chunk_is_lost(tmp_path):
    folder, scale = written_without_zeros(tmp_path, "zarr", None)
    (folder / "0").unlink()
    with pytest.raises(UserError, match="damaged"):
        restore_params(tmp_path, wanted({"decoder/decoder_norm/scale": scale}))


def test_of_two_arrays_with_one_name_of_ours_none_is_lost_unsaid(tmp_path):
    table = np.ones((4, 2), np.float32)
    t5x_folders.write({"target/token_embedder/embedding": table,
                       "target/decoder/token_embedder/embedding": 2 * table},
                      tmp_path / "checkpoint_1")
    assert len(conversion.open_any(tmp_path).homeless) == 1


def test_orbax_names_do_not_lead_out_of_the_folder(tmp_path):
    t5x_folders.write_orbax({"target/decoder/decoder_norm/scale": np.ones(3, np.float32)},
                            tmp_path / "checkpoint_1", database=False)
    tree = tmp_path / "checkpoint_1" / "state" / "_METADATA"
    tree.write_text(tree.read_text().replace('"scale"', '"../../scale"'))
    with pytest.raises(UserError, match="leads elsewhere"):
        conversion.open_any(tmp_path)


def test_orbax_of_2022_kept_the_names_in_a_msgpack_file(tmp_path):
    place = tmp_path / "checkpoint_7"
    t5x_folders.write({"target/decoder/decoder_norm/scale": np.arange(3, dtype=np.float32)},
                      place / "state")
    (place / "state" / "checkpoint").write_bytes(msgpack.packb({
        "target": {"decoder": {"decoder_norm": {
            "scale": "PLACEHOLDER://target.decoder.decoder_norm.scale"}}},
        "state": {"step": msgpack.ExtType(1, msgpack.packb(([], "int32", b"\7\0\0\0")))}}))
    source, step, _ = open_source(tmp_path)
    assert step == 7 and source.leaves["decoder/decoder_norm/scale"].shape == (3,)


def test_each_device_reads_its_part_alone(eight_devices, model_dir):
    eight_devices(f"""
        import jax, numpy as np
        from etils import epath
        from jax.sharding import NamedSharding, PartitionSpec as P
        from vishwam_t5x.checkpointing.convert import t5x
        from vishwam_t5x.checkpointing.sources import Request

        source = t5x.open_t5x(epath.Path({str(model_dir / "checkpoint_300")!r}))
        name = "target/token_embedder/embedding"
        mesh = jax.make_mesh((4, 2), ("data", "model"))
        for spec, times in ((P(None, "model"), 1), (P("data", "model"), 1), (P(), 1)):
            before, parts = source.bytes_read, []
            read, source.read_part = source.read_part, lambda name, part: (
                parts.append(part), read(name, part))[1]
            array = source.read({{name: Request(np.float32, NamedSharding(mesh, spec))}})[name]
            source.read_part = read
            assert source.bytes_read - before == array.nbytes * times, spec
            assert len(parts) == {{P(): 1, P(None, "model"): 2}}.get(spec, 8), parts
        """)


def test_arrays_larger_than_a_part_are_never_whole_in_memory(tmp_path):
    big = np.zeros((5000, 8192), np.float32)  # 156 MiB
    big[::1000] = 1.5
    source = t5x_folders.Arrays({"params/encoder/layers_0/mlp/wi/kernel": big})
    theirs = "target/encoder/layers_0/mlp/wi/kernel"
    for kind in (t5x.LEGACY, t5x.ORBAX):
        place = epath.Path(tmp_path / kind / "checkpoint_1")
        place.mkdir(parents=True)
        t5x.write_t5x(source, {theirs: "params/encoder/layers_0/mlp/wi/kernel"}, place,
                      {theirs: "float32"}, kind)
        assert 2**22 < source.largest <= report.PART_BYTES
        stored = t5x.open_t5x(place)
        np.testing.assert_array_equal(
            stored.read_part(theirs, (slice(2990, 3010), slice(0, 8192))), big[2990:3010])


@pytest.mark.parametrize("shape, itemsize, chunk", [
    ((384, 128), 4, (384, 128)), ((32128, 4096), 4, (4016, 4096)),
    ((4096, 4096), 4, (4096, 4096)), ((4096, 16384), 2, (4096, 8192)), ((), 4, ())])
def test_chunks_are_divisors_of_at_most_64_mib(shape, itemsize, chunk):
    assert t5x_legacy.chunk_shape(shape, itemsize) == chunk


def test_bfloat16(tmp_path):
    array = np.linspace(-3, 3, 40).reshape(8, 5).astype(ml_dtypes.bfloat16)
    place = t5x_folders.write({"target/token_embedder/embedding": array}, tmp_path / "checkpoint_5")
    header = json.loads((place / "target.token_embedder.embedding" / ".zarray").read_text())
    assert header["dtype"] == "bfloat16"
    for dtype in (ml_dtypes.bfloat16, np.float32):
        found, _ = restore_params(place, wanted({EMBEDDING: array.astype(dtype)}))
        np.testing.assert_array_equal(found["text_token_embedder"]["embedding"],
                                      array.astype(dtype))


@pytest.mark.parametrize("pairs", [
    [("target/token_embedder/embedding", "target/decoder/logits_table")],
    [("text_token_embedder/(.*)", "decoder/logits_table")],
    [(r"(target|other)/token_embedder/.*", "target/decoder/logits_table")]])
def test_assignment_maps_in_t5x_names_and_ours(tmp_path, pairs):
    table = np.arange(6, dtype=np.float32).reshape(3, 2)
    place = t5x_folders.write({"target/decoder/logits_table": table}, tmp_path / "checkpoint_1")
    found, _ = restore_params(place, wanted({EMBEDDING: table}), assignment_map=pairs)
    np.testing.assert_array_equal(found["text_token_embedder"]["embedding"], table)


def test_assignment_map_gives_t5x_names_and_leaves_out(model_dir):
    mine = {"target_encoders_text/other": params()[LOGITS], EMBEDDING: np.zeros((2, 2), np.float32),
            "decoder/new/scale": np.ones(3, np.float32)}
    found, report = restore_params(
        model_dir, unflatten_names(mine), allow_missing=True, assignment_map=[
            ("target_encoders_text/other", "target/decoder/logits_dense/kernel"),
            ("target/token_embedder/embedding", None)])
    np.testing.assert_array_equal(found["target_encoders_text"]["other"], params()[LOGITS])
    assert report.dropped == (EMBEDDING,) and report.missing == ("decoder/new/scale",)


def pickled(place):
    (place / "checkpoint").write_bytes(msgpack.packb({"optimizer": {
        "target": {"a": msgpack.ExtType(7, b"cos\nsystem\n")}}}))


def object_array(place):
    (place / "checkpoint").write_bytes(msgpack.packb({"optimizer": {
        "target": {"a": msgpack.ExtType(1, msgpack.packb(([1], "object", b"12345678")))}}}))


DAMAGES = {
    "no chunk": lambda place: (place / "target.encoder.encoder_norm.scale" / "0").unlink(),
    "half a chunk": lambda place: (place / "target.encoder.encoder_norm.scale" / "0").write_bytes(
        t5x_folders.real_files()["target.encoder.encoder_norm.scale/0"][:200]),
    "no folder": lambda place: shutil.rmtree(place / "target.encoder.encoder_norm.scale"),
    "half a tree": lambda place: (place / "checkpoint").write_bytes(
        t5x_folders.real_files()["checkpoint"][:9000]),
    "another shape": lambda place: (place / "target.encoder.encoder_norm.scale" / ".zarray"
                                    ).write_text((place / "target.encoder.encoder_norm.scale" /
                                                  ".zarray").read_text().replace("128", "64")),
    "an object": pickled, "an array of objects": object_array}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_seen(copy, damage):
    DAMAGES[damage](copy)
    with pytest.raises(UserError, match="damaged") as error:
        restore_params(copy, wanted(params()))
    assert str(copy) in str(error.value) and len(str(error.value).splitlines()) < 6


def test_tensorflow_checkpoints_are_refused_with_what_to_do(tmp_path):
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-1000"\n')
    for name in ("model.ckpt-1000.index", "model.ckpt-1000.data-00000-of-00002"):
        (tmp_path / name).write_bytes(b"\0")
    with pytest.raises(UserError, match="TensorFlow") as error:
        open_source(tmp_path)
    assert "convert_tf_checkpoint" in error.value.fix


def test_unknown_layouts_say_what_was_found_and_looked_for(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(UserError, match="holds no checkpoint") as error:
        open_source(tmp_path)
    assert "weights.bin" in error.value.got and "checkpoint_STEP" in error.value.fix
    (tmp_path / "checkpoint_10").mkdir()
    with pytest.raises(UserError, match="no checkpoint in this folder is whole"):
        open_source(tmp_path)


def test_the_step_asked_for_is_named_where_it_is_not(model_dir):
    with pytest.raises(UserError, match="there is no checkpoint") as error:
        open_source(model_dir / "checkpoint_200")
    assert "checkpoint_300" in error.value.fix


def test_names_go_both_ways():
    ours = [name for theirs in t5x_folders.state() for name in names.from_t5x(theirs)]
    places, bookkeeping, homeless = names.all_to_t5x(ours)
    assert sorted(places.values()) == sorted(t5x_folders.state())
    assert bookkeeping == ("opt_state/step",) and not homeless
    decoder = ["params/text_token_embedder/embedding", "params/decoder/layers_0/mlp/wi/kernel"]
    assert names.all_to_t5x(decoder)[0][decoder[0]] == "target/decoder/token_embedder/embedding"
    assert names.all_to_t5x(["params/encoder/layers_0/attention/query_norm/scale"])[2]


def test_spec_is_not_needed_for_an_unsharded_mesh(model_dir):
    mesh = jax.make_mesh((1,), ("data",))
    place = jax.sharding.NamedSharding(mesh, PartitionSpec("data"))
    abstract = unflatten_names({EMBEDDING: jax.ShapeDtypeStruct(
        params()[EMBEDDING].shape, np.float32, sharding=place)})
    found, _ = restore_params(model_dir, abstract)
    assert found["text_token_embedder"]["embedding"].sharding == place
