"""Codes as pictures and as sound: by the codecs of a model, or by one that was trained apart."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int, Shaped

from vishwam_t5x.core.batch import SignalSpec
from vishwam_t5x.core.errors import UserError, one_of
from vishwam_t5x.core.trees import flatten_names, unflatten_names
from vishwam_t5x.data.spectrogram import UNIFIED_IO2_TARGET, LogMelConfig, mel_powers
from vishwam_t5x.data.waveform import GriffinLimConfig, waveform_of
from vishwam_t5x.models.codecs import hifi_gan
from vishwam_t5x.models.codecs.audio_vqgan import AudioVQGANConfig
from vishwam_t5x.models.codecs.hifi_gan import HiFiGAN, HiFiGANConfig
from vishwam_t5x.models.codecs.image_vqgan import ImageVQGANConfig

Render = Callable[[Int[np.ndarray, "n"]], Float[np.ndarray, "..."]]
"""Codes [n] from 0 -> pixels [height, width, channels] in [0, 1], or a spectrogram."""

_AT_ONCE = 8  # grids that a device decodes together
_PLACES = ("", "discrete_vae/", "target_encoders_image/discrete_vae/",
           "target_encoders_audio/discrete_vae/")


class Renderer:
    """A codec on the devices of this process alone; each of its ways is compiled once."""

    def __init__(self, codec: ImageVQGANConfig | AudioVQGANConfig, params: Any) -> None:
        """Args:
            codec: its config.
            params: its parameters, wherever they are.
        """
        mesh = Mesh(np.asarray(jax.local_devices()), ("rows",))
        self._rows = NamedSharding(mesh, PartitionSpec("rows"))
        self._params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        self._batch = _AT_ONCE * mesh.size
        module = codec.build()

        def decode(params: Any, codes: jax.Array) -> jax.Array:
            return codec.finish(module.apply({"params": params}, codes, method="decode"))

        def encode(params: Any, signals: jax.Array) -> jax.Array:
            return module.apply({"params": params}, codec.prepare(signals), method="encode")

        self._decode, self._encode = jax.jit(decode), jax.jit(encode)

    def __call__(self, codes: Int[np.ndarray, "n"]) -> Float[np.ndarray, "..."]:
        """Returns the picture in [0, 1], or the spectrogram, of codes from 0, float32."""
        return self.many(np.asarray(codes)[None])[0]

    def many(self, codes: Int[np.ndarray, "b n"]) -> Float[np.ndarray, "b ..."]:
        """Returns the pictures, or the spectrograms, of several grids."""
        return self._in_batches(self._decode, np.asarray(codes, np.int32))

    def encode(self, signals: Shaped[np.ndarray, "b ..."]) -> Int[np.ndarray, "b n"]:
        """Returns the codes of pictures (uint8, or floating in [0, 1]) or of spectrograms."""
        return self._in_batches(self._encode, np.asarray(signals))

    def _in_batches(self, function: Callable[[Any, jax.Array], jax.Array], values: np.ndarray
                    ) -> np.ndarray:
        found = []
        for first in range(0, len(values), self._batch):
            part = values[first:first + self._batch]
            missing = self._batch - len(part)
            filled = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)])
            made = function(self._params, jax.device_put(filled, self._rows))
            found.append(np.asarray(made)[:len(part)])
        return np.concatenate(found)


def of_model(config: Any, params: Any, mesh: Mesh, modalities: Collection[str]
             ) -> dict[str, Renderer]:
    """Returns the codecs that a model holds, by target modality; all processes must call it.

    Args:
        config: of the model.
        params: its parameters, split over the mesh in any way.
        mesh: the devices.
        modalities: no others.
    """
    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))
    found = {}
    for modality, codec in getattr(config, "codecs", {}).items():
        if modality not in modalities:
            continue
        own = whole(params[config.target(modality).module_name]["discrete_vae"])
        local = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), own)
        found[modality] = Renderer(codec, local)
    return found


@dataclasses.dataclass(frozen=True)
class CodecFile:
    """A codec that was trained apart, read from a checkpoint when it is first used.

    Attributes:
        codec: its config, as it was trained.
        checkpoint: MODEL_DIR of its run, a checkpoint of that, or of a model that holds it; a file
            that `vishwam convert` has made of a VQGAN's own.
    """

    codec: ImageVQGANConfig | AudioVQGANConfig
    checkpoint: str

    def __post_init__(self) -> None:
        if not isinstance(self.codec, ImageVQGANConfig | AudioVQGANConfig):
            raise UserError("CodecFile.codec must be the config of a codec", got=repr(self.codec),
                            fix="codec = @image_vqgan.ImageVQGANConfig()")

    @property
    def signal(self) -> SignalSpec:
        """What `encode` codes."""
        return self.codec.signal

    @functools.cached_property
    def place(self) -> str:
        """The very checkpoint, of a MODEL_DIR the newest."""
        from vishwam_t5x.checkpointing.restore import open_source

        return open_source(self.checkpoint, checksums=False)[2]

    @functools.cached_property
    def renderer(self) -> Renderer:
        """The codec, restored.

        Raises:
            UserError: the checkpoint holds none of these sizes.
        """
        return Renderer(self.codec, read_codec(self.codec, self.place))

    def __call__(self, codes: Int[np.ndarray, "n"]) -> Float[np.ndarray, "..."]:
        """See `Renderer`."""
        return self.renderer(codes)

    def many(self, codes: Int[np.ndarray, "b n"]) -> Float[np.ndarray, "b ..."]:
        """See `Renderer.many`."""
        return self.renderer.many(codes)

    def encode(self, signals: Shaped[np.ndarray, "b ..."]) -> Int[np.ndarray, "b n"]:
        """See `Renderer.encode`."""
        return self.renderer.encode(signals)


def read_codec(codec: ImageVQGANConfig | AudioVQGANConfig, checkpoint: str) -> Any:
    """Returns the parameters of a codec, of whatever it is a part of in a checkpoint.

    Raises:
        UserError: nothing is there, or no codec of these sizes.
    """
    from vishwam_t5x.checkpointing.restore import open_source, restore_params

    module = codec.build()
    signal = codec.prepare(jnp.zeros((1, *codec.smallest), jnp.float32))
    boxed = jax.eval_shape(module.init, jax.random.key(0), signal)["params"]
    wanted = flatten_names(meta.unbox(boxed))
    source, _, where = open_source(checkpoint)
    for place in _PLACES:
        stored = {name: source.leaves.get(place + name) for name in wanted}
        if all(leaf is not None and tuple(leaf.shape) == wanted[name].shape
               for name, leaf in stored.items()):
            named = unflatten_names({place + name: leaf for name, leaf in wanted.items()})
            params, _ = restore_params(checkpoint, named)
            return unflatten_names({name.removeprefix(place): leaf
                                    for name, leaf in flatten_names(params).items()})
    raise UserError("the checkpoint holds no codec of these sizes", got=where,
                    fix="give the codec's config as it was trained, and the checkpoint of its run")


@dataclasses.dataclass(frozen=True)
class SoundConfig:
    """How codes become a waveform.

    Attributes:
        decode: turns codes into the spectrogram of a codec; None: the model's codec does.
        log_mel: how the codec's spectrograms are made of waveforms.
        griffin_lim: rounds in which the phase is guessed, where there is no vocoder.
        vocoder_path: weights of a HiFi-GAN (.npz or .safetensors, by the names of jik876/hifi-gan);
            None: no vocoder.
        vocoder: its sizes.
        vocoder_reads: what it was trained on: 'power', the mel powers, as Unified-IO 2's; or 'log',
            their natural logarithm.
    """

    decode: Render | None = None
    log_mel: LogMelConfig = UNIFIED_IO2_TARGET
    griffin_lim: GriffinLimConfig = GriffinLimConfig()
    vocoder_path: str | None = None
    vocoder: HiFiGANConfig = HiFiGANConfig()
    vocoder_reads: Literal["power", "log"] = "power"

    def __post_init__(self) -> None:
        one_of(self.vocoder_reads, ("power", "log"), "SoundConfig.vocoder_reads")

    def waveform(self, spectrogram: Float[np.ndarray, "frames mels"]
                 ) -> Float[np.ndarray, "samples"]:
        """Returns the waveform of a spectrogram, float32, `log_mel.sample_rate` samples a second.

        Raises:
            UserError: another number of mel bins, or weights that cannot be read.
        """
        if self.vocoder_path is None:
            return waveform_of(spectrogram, self.log_mel, self.griffin_lim)
        powers = mel_powers(spectrogram, self.log_mel).astype(np.float32)
        return np.asarray(self._sounded((np.log(powers) if self.vocoder_reads == "log"
                                         else powers)[None]))[0]

    @functools.cached_property
    def _sounded(self) -> Callable[[np.ndarray], jax.Array]:
        weights = hifi_gan.from_pytorch(hifi_gan.read_weights(str(self.vocoder_path)), self.vocoder)
        return functools.partial(jax.jit(HiFiGAN(self.vocoder).apply), weights)
