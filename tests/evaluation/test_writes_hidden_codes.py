"""What a task hid from the encoder is written as the model has learned it: behind its masks."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from evaluation import small_model

from vishwam_t5x.evaluation.generator import DecodingConfig, Generator
from vishwam_t5x.evaluation.requests import Request
from vishwam_t5x.parallelism.mesh import make_mesh

HIDDEN = np.asarray([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], np.int32)


def model(**options):
    text, image = small_model.model().config.targets
    return small_model.model(targets=(text, dataclasses.replace(image, **options)))


def requests():
    for number, hidden in enumerate(HIDDEN):
        mask = {"targets/image/task_mask": hidden} if hidden.any() else {}
        yield Request({"inputs/text/tokens": np.asarray([5 + number, 9, 1], np.int32)},
                      {"targets/image/targets": np.full(4, 7, np.int32), **mask}, number)


def generator(module, **decoding):
    return Generator(module, make_mesh(), None, 2, {"image": DecodingConfig(**decoding)}, 8,
                     {"text": 16}, without_text=lambda ids, modality: ids[-1:])


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_each_row_is_written_behind_its_own_mask(guidance):
    module = model(dynamic_mask=True, mask_token=True)
    params = jax.tree.map(lambda leaf: 3 * leaf, small_model.params(module))
    logits = jax.jit(lambda batch: module.apply({"params": params}, batch, method="logits"))
    found = {done.tag: done for done in generator(module, guidance=guidance).generate(
        params, requests(), "image")}
    differs = False
    for request in requests():
        both = np.zeros((2, 16), np.int32)
        both[0, :3], both[1, :1] = request.inputs["inputs/text/tokens"], 1

        def chosen(written, mask, both=both):
            inputs = np.zeros((2, 4), np.int32)
            inputs[:, 1:len(written) + 1] = written
            given, bare = jax.nn.log_softmax(logits({
                "inputs/text/tokens": both, "inputs/text/mask": (both > 0).astype(np.int32),
                "targets/image/inputs": inputs, "targets/image/mask": np.ones((2, 4), np.int32),
                "targets/image/task_mask": np.stack([mask, mask])})["image"][:, len(written)])
            guided = ((1 + guidance) * given - guidance * bare)[2:]
            return int(np.argmax(guided)) + 2

        written: list[int] = []
        for _ in range(4):
            token = chosen(written, HIDDEN[request.tag])
            differs |= token != chosen(written, np.zeros(4, np.int32))
            written.append(token)
        assert found[request.tag].tokens["image"].tolist() == written
    assert differs, "the masks changed nothing"


def test_what_would_read_its_answer_is_named():
    writer = generator(model(mask_token=True, shift_back=True))
    why = [writer.misfit(request, "image") for request in requests()]
    assert why[2] is None and "can be scored, but not written" in why[0] == why[1]
    assert all(writer.misfit(request) is None for request in requests())
