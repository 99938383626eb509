"""What a model writes in codes, as files to look at and to hear beside the lines that name them."""

from __future__ import annotations

import dataclasses
import io
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from vishwam_t5x import evaluation_setup
from vishwam_t5x.core import distributed, storage
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data.recordings import encode_wave
from vishwam_t5x.evaluation import rendering, restoring
from vishwam_t5x.evaluation.evaluator import Sample
from vishwam_t5x.evaluation.predictions import Prediction
from vishwam_t5x.evaluation.rendering import Render, SoundConfig

_KINDS = {"image": "picture", "audio": "sound"}


@dataclasses.dataclass(frozen=True)
class Drawer:
    """Draws and sounds what there are codecs for.

    Attributes:
        renders: by modality, 'image' or 'audio', what decodes its codes.
        sound: how spectrograms become waveforms.
    """

    renders: Mapping[str, Render]
    sound: SoundConfig = SoundConfig()

    def written(self, lines: Sequence[Prediction], path: pathlib.PurePath, of_tasks: bool
                ) -> Iterator[Prediction]:
        """Yields the lines with "picture" or "sound", the files of theirs that were written.

        Args:
            lines: predictions.
            path: of the file of predictions, beside which they go.
            of_tasks: their examples are numbered by task.
        """
        files = {modality: self._decoded(lines, modality) for modality in self.renders}
        for number, line in enumerate(lines):
            # Other outputs, of other splits say, may lie in the same folder.
            stem = f"{path.stem}-{line.task.replace('/', '_')}" if of_tasks else path.stem
            extra = dict(line.extra)
            for modality, decoded in files.items():
                if number in decoded:
                    ending, data = self._file(modality, decoded[number])
                    place = path.with_name(f"{stem}-{line.example}{ending}")
                    storage.write_bytes(place, data)
                    extra[_KINDS[modality]] = place.name
            yield dataclasses.replace(line, extra=extra)

    def shown(self, samples: Sequence[Sample]) -> list[Sample]:
        """Returns the samples with pictures as outputs, where those were left as codes."""
        lines = [sample.prediction for sample in samples]
        decoded = self._decoded(lines, "image") if "image" in self.renders else {}
        return [dataclasses.replace(sample, output=decoded[number])
                if number in decoded and np.ndim(sample.output) == 1
                and np.issubdtype(np.asarray(sample.output).dtype, np.integer) else sample
                for number, sample in enumerate(samples)]

    def _decoded(self, lines: Sequence[Prediction], modality: str) -> dict[int, np.ndarray]:
        """What the codes of each line are, by its number; decoded together where that goes."""
        codes = {number: found for number, line in enumerate(lines)
                 if (found := codes_of(line, modality)) is not None}
        render = self.renders[modality]
        if codes and hasattr(render, "many"):
            return dict(zip(codes, render.many(np.stack(list(codes.values()))), strict=True))
        return {number: np.asarray(render(each)) for number, each in codes.items()}

    def _file(self, modality: str, decoded: np.ndarray) -> tuple[str, bytes]:
        if _KINDS[modality] == "sound":
            return ".wav", encode_wave(self.sound.waveform(decoded), self.sound.log_mel.sample_rate)
        from PIL import Image

        pixels = np.asarray(decoded, np.float32)
        if pixels.ndim == 3 and pixels.shape[-1] == 1:
            pixels = pixels[..., 0]
        drawn = io.BytesIO()
        Image.fromarray(np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)).save(drawn, "PNG")
        return ".png", drawn.getvalue()


def codes_of(line: Prediction, modality: str) -> np.ndarray | None:
    """Returns the codes of a modality that a line predicts; None if it predicts none."""
    if modality not in line.written:
        return None
    return line.prediction if len(line.written) == 1 else line.prediction[modality]


def check(config: Any, modality: str, decode_image: Render | None, sound: SoundConfig) -> None:
    """Raises `UserError` unless what is to be written of a modality can be drawn or sounded."""
    bound = {"image": decode_image, "audio": sound.decode}
    if modality not in _KINDS or bound[modality] is not None or (
            modality in getattr(config, "codecs", {})):
        return
    name, macro = {"image": ("decode_image", "DECODE_IMAGE"),
                   "audio": ("SoundConfig.decode", "DECODE_AUDIO")}[modality]
    raise UserError(f"a {_KINDS[modality]} cannot be made of codes", got=f"{name} is not bound",
                    fix=f"{macro} = @rendering.CodecFile(), or a function of codes; or a model "
                        "with a codec: CodeOutput.codec")


def drawer(config: Any, params: Any, mesh: Mesh, modalities: Collection[str],
           decode_image: Render | None = None, sound: SoundConfig = SoundConfig()) -> Drawer:
    """Returns what draws a model's predictions; every process must call it.

    Args:
        config: of the model.
        params: its parameters.
        mesh: the devices that they are on.
        modalities: that will be written.
        decode_image: what is used instead of the model's own codec; None: that.
        sound: how codes become waveforms.
    """
    bound = {"image": decode_image, "audio": sound.decode}
    mine = [modality for modality in modalities
            if modality in _KINDS and bound.get(modality) is None]
    renders: dict[str, Render] = {**rendering.of_model(config, params, mesh, mine)}
    renders |= {modality: render for modality, render in bound.items()
                if render is not None and modality in modalities}

    def load() -> None:
        for render in renders.values():
            getattr(render, "renderer", None)  # now, not when much has been written

    # Process 0 alone draws, but a checkpoint is read by all together.
    evaluation_setup.on_all("codecs", load)
    return Drawer(renders, sound)


def described(decode_image: Render | None, sound: SoundConfig) -> dict[str, Any]:
    """Returns what files depend on beside the model; JSON values. Every process must call it.

    Raises:
        UserError: a codec's checkpoint is not there, or not the same on all processes.
    """
    found: dict[str, Any] = {}
    bound = (("image", decode_image), ("audio", sound.decode))
    # First what each sees for itself: one that sees nothing would leave the others waiting.
    kinds = evaluation_setup.on_all("codecs found", lambda: {
        f"{modality} codec": f"{render.checkpoint}: {restoring.kind_of(render.checkpoint)}"
        for modality, render in bound if isinstance(render, rendering.CodecFile)})
    distributed.compare("the codecs", kinds, fix="a checkpoint on a disk that all hosts share, or "
                        "in a bucket")
    for modality, render in bound:
        if render is not None:
            found[_KINDS[modality] + "s"] = evaluation_setup.code_of(render)
        if isinstance(render, rendering.CodecFile):
            found[f"{modality} codec"] = restoring.identity(render.place)
    if (plain := dataclasses.replace(sound, decode=None)) != SoundConfig():
        found["waveforms"] = evaluation_setup.described(plain)
    return found
