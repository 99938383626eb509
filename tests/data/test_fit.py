"""What would end a run in its middle is found before it begins."""

import dataclasses

import pytest
from data.small_data import PATCHES, small_spec, small_tasks

from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.fit import check_longest, check_model
from vishwam_t5x.data.records import TaskCache
from vishwam_t5x.data.source import DatasetConfig, open_dataset
from vishwam_t5x.data.synthetic import SyntheticFeature, SyntheticTask, write_cache
from vishwam_t5x.models import config
from vishwam_t5x.objectives.denoisers import MixtureOfDenoisers
from vishwam_t5x.objectives.vocabulary import VocabularyLayout


def objective(num_sentinels=40, **options):
    return MixtureOfDenoisers(**{
        "vocabulary": VocabularyLayout(base_size=256, num_sentinels=num_sentinels),
        "input_modalities": ("text", "image"), "image": PATCHES["image"], **options})


class OneIsLong(SyntheticTask):
    """Texts of 5 tokens, and one of 90 far from the beginning."""

    @property
    def length_table(self):
        names, table = super().length_table
        table[77] = 90
        return names, table


def texts():
    return OneIsLong("texts", {"text": SyntheticFeature(5, 5)}, 80)


def test_what_fits_is_let_through():
    check_longest(small_tasks(), objective(), small_spec())


def test_the_longest_record_is_found_wherever_it_is():
    with pytest.raises(UserError, match="'texts' does not fit in an empty row") as caught:
        check_longest([texts()], objective(), small_spec())
    assert "record 77 needs" in str(caught.value)
    check_longest([texts()], objective(), small_spec(), max_examples=77)


def test_too_few_sentinels_are_reported_with_the_task():
    wide = dataclasses.replace(small_spec(), input_length=128, target_length=128)
    with pytest.raises(UserError, match="'texts', record 77: .*sentinels"):
        check_longest([texts()], objective(num_sentinels=14), wide)


def test_a_denoiser_that_is_never_drawn_is_not_looked_at():
    narrow = dataclasses.replace(small_spec(), input_length=100, target_length=24,
                                 input_capacities={"text": 100, "image": 24},
                                 target_capacities={"text": 24, "image": 24})
    check_longest([texts()], objective(text_weights={"S": 1.0}), narrow)
    with pytest.raises(UserError, match=r"TASK_FEATURE_LENGTHS\['targets'\]"):
        check_longest([texts()], objective(text_weights={"X": 1.0}), narrow)


def test_opening_a_dataset_looks(tmp_path):
    write_cache(SyntheticTask("novels", {"text": SyntheticFeature(90, 95)}, 5), tmp_path)
    config = DatasetConfig("novels", {"inputs": 64, "targets": 64}, 2, cache_dir=str(tmp_path))
    with pytest.raises(UserError, match="'novels' does not fit in an empty row"):
        open_dataset(config, objective())


def pictures(tmp_path, width=4, num_codes=50, num_ids=256):
    write_cache(SyntheticTask("pictures", {
        "text": SyntheticFeature(20, 30, num_ids=num_ids),
        "image": SyntheticFeature(4, 4, rest=(width, 1), dtype="float32"),
        "image_codes": SyntheticFeature(8, 8, num_ids=num_codes)}, 100, patch_specs=PATCHES),
        tmp_path, max_shard_records=30)
    return TaskCache.open(tmp_path / "tasks" / "pictures" / "train", PATCHES)


def model():
    layout = VocabularyLayout(base_size=256, num_sentinels=4, num_location_bins=0, num_history=0)
    image = config.PatchInput(modality="image", patch_dim=4, grid=(2, 2))
    codes = config.CodeOutput(modality="image", vocab_size=60, num_codes=50, grid=(2, 4))
    rows = {"vocab_size": layout.table_size}
    return config.EncoderDecoderConfig(
        emb_dim=16, num_heads=2, head_dim=8, mlp_dim=16, num_encoder_layers=1,
        num_decoder_layers=1, inputs=(config.TextInput(**rows), image),
        targets=(config.TextOutput(**rows), codes)), layout


def test_what_belongs_together_is_let_through(tmp_path):
    task = pictures(tmp_path)
    assert task.manifest.largest_ids == {
        name: max(int(task.read(i)[name].max()) for i in range(100))
        for name in ("text", "image_codes")}
    check_model([task, task, texts()], *model())  # what was seen of one says nothing of the next


@pytest.mark.parametrize(("made", "message"), [
    ({"num_codes": 51}, "code 50 in 'image_codes', the model has 50 codes"),
    ({"num_ids": 2000}, "text of another vocabulary"),
    ({"width": 8}, r"'image' of 2 x 4 patches, PatchInput.grid \(2, 2\)")])
def test_what_a_model_would_take_for_something_else_is_refused(tmp_path, made, message):
    with pytest.raises(UserError, match=message):
        check_model([pictures(tmp_path, **made)], *model())
