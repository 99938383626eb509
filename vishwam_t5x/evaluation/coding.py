"""Targets that are pixels or spectrograms, coded by the model before they are scored."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from vishwam_t5x.evaluation.placement import Placement
from vishwam_t5x.evaluation.requests import Request


class Coder:
    """Puts the codes of a model's own codecs in the place of what its requests' targets hold."""

    def __init__(self, model: Any, placement: Placement) -> None:
        """Args:
            model: Flax module; one without codecs leaves requests as they are.
            placement: rows that are coded together, and the mesh.
        """
        self._placement = placement
        self._names = {f"targets/{modality}/{codec.signal.name}": f"targets/{modality}/targets"
                       for modality, codec in getattr(model.config, "codecs", {}).items()}
        self._compiled: Any = jax.jit(
            lambda params, batch: model.apply({"params": params}, batch, method="with_codes"),
            out_shardings=placement.replicated)

    def coded(self, params: Any, requests: Iterable[Request]) -> Iterator[Request]:
        """Yields the requests in their order, at most a batch later; on all processes together."""
        if not self._names:
            yield from requests
            return
        stream = iter(requests)
        while rows := list(itertools.islice(stream, self._placement.batch_size)):
            for name, wanted in self._names.items():
                at = [index for index, row in enumerate(rows) if name in row.targets]
                if at:
                    codes = self._codes(params, name, wanted, [rows[index] for index in at])
                    for index, own in zip(at, codes, strict=True):
                        targets = {key: value for key, value in rows[index].targets.items()
                                   if key != name}
                        rows[index] = dataclasses.replace(rows[index],
                                                          targets={**targets, wanted: own})
            yield from rows

    def _codes(self, params: Any, name: str, wanted: str, rows: Sequence[Request]) -> np.ndarray:
        signals = np.stack([row.targets[name] for row in rows])
        missing = self._placement.batch_size - len(signals)
        filled = np.concatenate([signals, np.repeat(signals[-1:], missing, axis=0)])
        with self._placement.context():
            made = self._compiled(params, self._placement.put({name: filled}))
        return np.asarray(jax.device_get(made[wanted]))[:len(rows)]
