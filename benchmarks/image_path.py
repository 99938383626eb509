"""Pictures decoded, resized, padded and cut into patches per CPU second, and the bytes of a batch.

usage: python benchmarks/image_path.py [--windows=9] [--pictures=16]

JPEG files of made-up pictures (noise of a photograph's spectrum, with edges; quality 85) become
384 x 384 pixels, 576 patches: by Unified-IO 2's path (tf.data, antialiased, float32 patches; only
where TensorFlow is installed), by ours exactly and fast (the extra `images`), and by our
preprocessor in a tf.data pipeline, as a task has it. The ways take turns in one process, on one
thread each; CPU seconds of all threads are counted.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import io
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from common import Figures
from PIL import Image

from vishwam_t5x.core.batch import BatchSpec, ModalityLengths
from vishwam_t5x.data import fast_pictures, pictures
from vishwam_t5x.data.assembly import PlacedExample, assemble
from vishwam_t5x.objectives.masking import PatchSpec, patchify

SIZES = ((640, 480), (1440, 1080))
SIDE, PATCHES = 384, PatchSpec(16, channels=3)
CONFIGS = {way: pictures.PictureConfig(SIDE, SIDE, resize=way) for way in ("exact", "fast")}


def natural(width: int, height: int, seed: int) -> bytes:
    """Returns the JPEG file of a made-up picture: about 2 bits a pixel, as photographs take."""
    rng = np.random.default_rng(seed)
    down, across = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    spectrum = np.fft.rfft2(rng.standard_normal((3, height, width)))
    spectrum /= np.maximum(np.hypot(down * height / width, across), 1 / width) ** 1.4
    pixels = np.fft.irfft2(spectrum, s=(height, width))
    pixels /= pixels.std((1, 2), keepdims=True)
    # Most of what differs from place to place is brightness.
    mix = np.asarray([[1, 0.35, 0.1], [1, -0.1, 0.2], [1, -0.25, -0.35]])
    pixels = np.einsum("ij,jhw->hwi", mix, pixels)
    rows, columns = np.mgrid[:height, :width]
    for _ in range(30):
        row, column, radius = rng.random(3) * (height, width, width / 8)
        pixels[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] += rng.normal(size=3)
    out = io.BytesIO()
    image = Image.fromarray(np.clip(128 + 45 * pixels, 0, 255).astype(np.uint8))
    image.save(out, "JPEG", quality=85)
    return out.getvalue()


Call = Callable[[], object]


def ours(way: str, files: Sequence[bytes]) -> list[np.ndarray]:
    """Returns the patches of all files."""
    return [patchify(pictures.read_picture(data, config=CONFIGS[way]).pixels, PATCHES)
            for data in files]


def original(files: Sequence[bytes]) -> Call:
    """Unified-IO 2's evaluation in tf.data: antialiased bilinear, centred on black, floats."""
    import tensorflow as tf

    side, size = SIDE // PATCHES.height, PATCHES.height

    def each(data: tf.Tensor) -> tf.Tensor:
        pixels = tf.image.convert_image_dtype(tf.io.decode_jpeg(data, channels=3), tf.float32)
        pixels = tf.image.resize_with_pad(pixels, SIDE, SIDE, antialias=True)
        cut = tf.reshape(pixels, (side, size, side, size, 3))
        return tf.reshape(tf.transpose(cut, (0, 2, 1, 3, 4)), (side * side, size * size * 3))

    dataset = _on_one_thread(tf.data.Dataset.from_tensor_slices(list(files)).map(each))
    return lambda: list(dataset.as_numpy_iterator())


def in_task(way: str, files: Sequence[bytes]) -> Call:
    """Our preprocessor as a task runs it, then patches."""
    import tensorflow as tf

    from vishwam_t5x.data.tf.image import decode_picture

    dataset = tf.data.Dataset.from_tensor_slices({"image_inputs": list(files)})
    dataset = _on_one_thread(decode_picture(dataset, "image_inputs", CONFIGS[way]))
    return lambda: [patchify(example["image_inputs"], PATCHES)
                    for example in dataset.as_numpy_iterator()]


def _on_one_thread(dataset: Any) -> Any:
    import tensorflow as tf

    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.autotune.enabled = False
    return dataset.with_options(options)


def arms(files: Sequence[bytes]) -> dict[str, Call]:
    """The ways that can be taken here, by name."""
    found: dict[str, Call] = {}
    tensorflow = importlib.util.find_spec("tensorflow") is not None
    if tensorflow:
        found["original"] = original(files)
    for way in CONFIGS:
        if way == "fast" and fast_pictures.codecs() is None:
            continue
        found[way] = functools.partial(ours, way, files)
        if tensorflow:
            found[f"{way}_in_task"] = in_task(way, files)
    return found


def reading(figures: Figures, number: int, windows: int) -> None:
    """Pictures a CPU second, way by way, and how far the fast way is from the exact one."""
    for width, height in SIZES:
        files = [natural(width, height, seed) for seed in range(number)]
        ways = arms(files)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for window in range(windows + 1):
            for name, run in ways.items():
                start = time.process_time()
                run()
                if window:  # the first one warms up
                    rates[name].append(number / (time.process_time() - start))
        size, kilobytes = f"{width}x{height}", round(sum(map(len, files)) / number / 1000)
        for name, taken in rates.items():
            figures.add(f"{name}_{size}", taken, "pictures/s", kilobytes=kilobytes)
            if name != "original" and "original" in rates:
                figures.add(f"{name}_to_original_{size}", [mine / theirs for mine, theirs in
                            zip(taken, rates["original"], strict=True)], "times")
        if "fast" in ways:
            figures.add(f"fast_psnr_{size}", [_psnr(data) for data in files], "dB")


def _psnr(data: bytes) -> float:
    exact, fast = (pictures.read_picture(data, config=config) for config in CONFIGS.values())
    error = exact.pixels.astype(np.float64) - fast.pixels
    return float(10 * np.log10(255**2 / np.mean(error[exact.inside] ** 2)))


def batches(figures: Figures, windows: int) -> None:
    """Bytes of a batch of 32 rows with an image in each, and the time to lay it out."""
    rows, patches = 32, np.zeros((576, PATCHES.patch_dim), np.uint8)
    example = {"inputs/text/tokens": np.ones((32,), np.int32),
               "targets/text/targets": np.ones((64,), np.int32)}
    lengths = ModalityLengths({"text": 32, "image": 576}, {"text": 64})
    for name, given, kept in (("bytes", patches, ("image",)),
                              ("floats", patches.astype(np.float32), ())):
        spec = BatchSpec(rows, 864, 512, {"text": 864, "image": 576}, {"text": 512},
                         {"image": PATCHES.patch_dim}, byte_patches=kept)
        placed = [PlacedExample(row, lengths, {**example, "inputs/image/input": given})
                  for row in range(rows)]
        taken = []
        for _ in range(windows):
            start = time.process_time()
            arrays = assemble(spec, rows, placed)
            taken.append((time.process_time() - start) * 1e3)
        size = sum(array.nbytes for array in arrays.values()) / 2**20
        figures.add(f"batch_of_{name}", [size], "MiB", rows=rows)
        figures.add(f"batch_of_{name}_cpu", taken, "ms", rows=rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=9)
    parser.add_argument("--pictures", type=int, default=16)
    options = parser.parse_args()
    figures = Figures("image_path")
    batches(figures, options.windows)
    reading(figures, options.pictures, options.windows)
    figures.write()


if __name__ == "__main__":
    main()
