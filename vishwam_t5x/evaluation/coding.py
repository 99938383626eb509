"""Pixels and spectrograms, coded before they are read or scored, and drawn of what was written."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float, Int

from vishwam_t5x.evaluation.placement import Placement
from vishwam_t5x.evaluation.requests import Request
from vishwam_t5x.models.outputs.codes import FIRST_CODE

_Tokens = Callable[[np.ndarray], np.ndarray]


class Coder:
    """Puts codes in the place of what requests hold instead of them: targets by the codecs of the
    model, inputs by those or by others.

    A request holds of an input 'inputs/image/signal' [1, *shape], and 'inputs/image/tokens' of the
    right length, whatever they are. All processes must call its methods together.
    """

    def __init__(self, model: Any, placement: Placement) -> None:
        """Args:
            model: Flax module; one without codecs leaves requests as they are.
            placement: rows that are coded together, and the mesh.
        """
        self._placement = placement
        codecs = getattr(model.config, "codecs", {})
        self._signals = {modality: f"targets/{modality}/{codec.signal.name}"
                         for modality, codec in codecs.items()}
        self._encoders: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
        self._compiled: Any = jax.jit(
            lambda params, batch: model.apply({"params": params}, batch, method="with_codes"),
            out_shardings=placement.replicated)
        self._rendered: Any = jax.jit(
            lambda params, batch, modality: model.apply(
                {"params": params}, batch["codes"], modality, method="render"),
            static_argnums=(2,), out_shardings=placement.replicated)

    def use(self, encoders: Mapping[str, Callable[[np.ndarray], np.ndarray]]) -> None:
        """Takes what codes the inputs of some modalities instead of the model: pictures or
        spectrograms [b, *shape] -> codes from 0 [b, n]."""
        self._encoders.update(encoders)

    def coded(self, params: Any, requests: Iterable[Request]) -> Iterator[Request]:
        """Yields the requests in their order with inputs and targets coded, at most a batch later;
        on all processes together."""
        return self.read(params, self._replaced(requests, "targets", {
            signal: (f"targets/{modality}/targets", self._by_model(params, signal))
            for modality, signal in self._signals.items()}))

    def read(self, params: Any, requests: Iterable[Request]) -> Iterator[Request]:
        """The same of inputs alone."""
        coders = {modality: self._by_model(params, signal)
                  for modality, signal in self._signals.items()}
        coders |= {modality: _by_other(encode) for modality, encode in self._encoders.items()}
        return self._replaced(requests, "inputs", {
            f"inputs/{modality}/signal": (f"inputs/{modality}/tokens", tokens)
            for modality, tokens in coders.items()})

    def drawn(self, params: Any, modality: str, codes: Int[np.ndarray, "b n"]
              ) -> Float[np.ndarray, "b ..."]:
        """Returns pictures in [0, 1], or spectrograms, of at most a batch of codes from 0, by the
        model's codec."""
        with self._placement.context():
            made = self._rendered(params, self._placement.put({"codes": self._filled(codes)}),
                                  modality)
        return np.asarray(jax.device_get(made))[:len(codes)]

    def _filled(self, values: np.ndarray) -> np.ndarray:
        """Repeats the last row up to a whole batch."""
        missing = self._placement.batch_size - len(values)
        return np.concatenate([values, np.repeat(values[-1:], missing, axis=0)])

    def _replaced(self, requests: Iterable[Request], side: Literal["inputs", "targets"],
                  coders: Mapping[str, tuple[str, _Tokens]]) -> Iterator[Request]:
        stream = iter(requests)
        for first in stream:
            if not coders.keys() & getattr(first, side).keys():
                yield first
                continue
            rows = [first, *itertools.islice(stream, self._placement.batch_size - 1)]
            for name, (place, tokens) in coders.items():
                at = [index for index, row in enumerate(rows) if name in getattr(row, side)]
                if not at:
                    continue
                made = tokens(np.stack([getattr(rows[index], side)[name] for index in at]))
                for index, own in zip(at, made, strict=True):
                    rest = {key: value for key, value in getattr(rows[index], side).items()
                            if key != name}
                    rows[index] = dataclasses.replace(rows[index], **{side: {**rest, place: own}})
            yield from rows

    def _by_model(self, params: Any, name: str) -> _Tokens:
        modality = name.split("/")[1]

        def tokens(signals: np.ndarray) -> np.ndarray:
            with self._placement.context():
                made = self._compiled(params, self._placement.put({name: self._filled(signals)}))
            return np.asarray(jax.device_get(made[f"targets/{modality}/targets"]))[:len(signals)]

        return tokens


def _by_other(encode: Callable[[np.ndarray], np.ndarray]) -> _Tokens:
    return lambda signals: np.asarray(encode(signals[:, 0]), np.int32) + np.int32(FIRST_CODE)
