"""What the quickstart fits to its training data: a SentencePiece model and an image codebook.

Both are fitted once and kept beside the cached tasks, in `CACHE_DIR/quickstart/`, each in a folder
named by a hash of what it was fitted to and how. A folder appears whole or not at all: it is
written under another name and renamed, and of two processes that fit at once the first one wins.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float, Int, UInt8

from vishwam_t5x.core.batch import SignalSpec
from vishwam_t5x.core.errors import UserError
from vishwam_t5x.data import copies, source
from vishwam_t5x_tasks import quickstart_sources as sources

VOCABULARY_SIZE = 1024
NUM_CODES = 64
PATCH = 2
_VOCABULARY_FILE = "text.model"
_CODEBOOK_FILE = "image_codebook.npy"
_MANIFEST_FILE = "manifest.json"
_VERSION = 1
"""Raised when the fitting below changes, so that old folders are not taken for new."""


@dataclasses.dataclass(frozen=True)
class PatchCodebook:
    """A codebook of square image patches: the nearest centre stands for the patch.

    Attributes:
        centres: float32 [num_codes, patch * patch * channels], pixels in [0, 1].
        patch: side of a patch, in pixels.
        image_shape: (height, width, channels) of the images it is for.
    """

    centres: np.ndarray
    patch: int
    image_shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        height, width, channels = self.image_shape
        if height % self.patch or width % self.patch:
            raise UserError("the patch size must divide the image",
                            got=f"patches of {self.patch} in {height} x {width}")
        assert self.centres.shape[1] == self.patch**2 * channels, self.centres.shape

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in an image."""
        return self.image_shape[0] // self.patch, self.image_shape[1] // self.patch

    def encode(self, images: Float[np.ndarray, "images height width channels"],
               ) -> Int[np.ndarray, "images patches"]:
        """Returns the codes of images, int32 [images, patches] in row-major order.

        Raises:
            UserError: the images have another shape than the codebook is for.
        """
        if images.shape[1:] != self.image_shape:
            raise UserError("the images are not of the size the codebook is for",
                            got=f"{images.shape[1:]}, codebook for {self.image_shape}")
        patches = to_patches(images, self.patch)
        # |p - c|^2 without |p|^2, which is the same for every centre.
        distance = (self.centres**2).sum(-1) - 2.0 * patches @ self.centres.T
        return distance.argmin(-1).astype(np.int32)

    def decode(self, codes: Int[np.ndarray, "images patches"],
               ) -> Float[np.ndarray, "images height width channels"]:
        """Returns the images of codes, float32 [images, height, width, channels] in [0, 1].

        Raises:
            UserError: a wrong number of codes for an image, or a code outside the codebook.
        """
        codes = np.asarray(codes)
        rows, columns = self.grid
        if codes.ndim != 2 or codes.shape[1] != rows * columns:
            raise UserError("an image of this codebook has one code per patch",
                            got=f"codes of shape {codes.shape}",
                            fix=f"[images, {rows * columns}]")
        if codes.size and (codes.min() < 0 or codes.max() >= len(self.centres)):
            raise UserError("a code lies outside the codebook",
                            got=f"codes {codes.min()} to {codes.max()} of {len(self.centres)}",
                            fix="subtract CODE_OFFSET from target ids before decoding them")
        height, width, channels = self.image_shape
        patches = self.centres[codes].reshape(-1, rows, columns, self.patch, self.patch, channels)
        return patches.transpose(0, 1, 3, 2, 4, 5).reshape(-1, height, width, channels)


def decode_image(codes: Int[np.ndarray, "patches"]) -> Float[np.ndarray, "height width channels"]:
    """Returns the picture of one image's codes, float32 in [0, 1]; for `vishwam infer`."""
    return codebook().decode(np.asarray(codes)[None])[0]


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The codebook as `vishwam infer` takes a codec: for what is drawn, and for what is read."""

    @property
    def signal(self) -> SignalSpec:
        """What `encode` codes."""
        fitted = codebook()
        return SignalSpec("pixels", fitted.image_shape, "uint8", fitted.grid)

    def __call__(self, codes: Int[np.ndarray, "patches"]
                 ) -> Float[np.ndarray, "height width channels"]:
        """See `decode_image`."""
        return decode_image(codes)

    def encode(self, pixels: UInt8[np.ndarray, "images height width channels"]
               ) -> Int[np.ndarray, "images patches"]:
        """Returns the codes of pictures, 255 for 1.0; see `PatchCodebook.encode`."""
        return codebook().encode(pixels.astype(np.float32) / 255)


def to_patches(images: Float[np.ndarray, "images height width channels"],
               patch: int) -> Float[np.ndarray, "images patches dim"]:
    """Cuts images into square patches, row-major, each flattened as (dy, dx, channel)."""
    count, height, width, channels = images.shape
    grid = images.reshape(count, height // patch, patch, width // patch, patch, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(count, -1, patch * patch * channels)


def cache_directory() -> pathlib.Path:
    """Returns VISHWAM_CACHE_DIR (of a bucket: its copy here), or ~/.cache/vishwam_t5x."""
    return pathlib.Path(copies.folder_of(source.default_cache_dir()))


def vocabulary_path() -> str:
    """Returns the path of the SentencePiece model; fits it the first time.

    Unigram model (Kudo 2018, arXiv:1804.10959) of 1,024 pieces, among them the 256 bytes, so that
    no text is unknown; fitted to the training passages and to the captions and prompts, each as
    often as it occurs in training. Ids: 0 padding, 1 end, 2 unknown.

    Raises:
        UserError: the folder is damaged or cannot be written.
    """
    return _vocabulary_path(cache_directory())


def codebook_path() -> str:
    """Returns the path of the codebook, float32 [64, 4] as .npy; fits it the first time.

    k-means (scikit-learn, one thread, fixed start) on the 2 x 2 patches of the training digits,
    centres in order of brightness.

    Raises:
        UserError: the folder is damaged or cannot be written, or scikit-learn is not installed.
    """
    return _codebook_path(cache_directory())


def codebook() -> PatchCodebook:
    """Returns the image codebook; fits it the first time.

    Raises:
        UserError: as `codebook_path`.
    """
    return read_codebook(codebook_path())


@functools.lru_cache(maxsize=4)
def read_codebook(path: str) -> PatchCodebook:
    """Reads a codebook of 8 x 8 grey images from its .npy file."""
    return PatchCodebook(np.load(path), PATCH, (8, 8, 1))


def describe(path: str) -> dict[str, str | int]:
    """Returns {'path', 'sha256', 'size'} of a fitted file, as its manifest has them."""
    manifest = json.loads((pathlib.Path(path).parent / _MANIFEST_FILE).read_text())
    return {"path": path, "sha256": manifest["sha256"], "size": manifest["size"]}


def training_sentences() -> list[str]:
    """Returns what the vocabulary is fitted to: training passages, captions and prompts."""
    _, labels = sources.digits("train")
    out = list(sources.passages("train"))
    for example, digit in enumerate(labels.tolist()):
        request = sources.choose(sources.DRAWING_REQUESTS, "train", example, "request")
        out += [sources.caption(digit), request.format(sources.DIGIT_NAMES[digit]),
                sources.choose(sources.IMAGE_QUESTIONS, "train", example, "question"),
                sources.choose(sources.AUDIO_QUESTIONS, "train", example, "audio question")]
    return out


@functools.lru_cache(maxsize=4)
def _vocabulary_path(cache: pathlib.Path) -> str:
    sentences = training_sentences()
    fingerprint = _fingerprint("\n".join(sentences).encode(), {"size": VOCABULARY_SIZE})
    folder = cache / "quickstart" / f"text-{fingerprint}"
    return _fitted(folder, _VOCABULARY_FILE, lambda: _fit_vocabulary(sentences), VOCABULARY_SIZE)


@functools.lru_cache(maxsize=4)
def _codebook_path(cache: pathlib.Path) -> str:
    images, _ = sources.digits("train")
    fingerprint = _fingerprint(images.tobytes(), {"codes": NUM_CODES, "patch": PATCH})
    folder = cache / "quickstart" / f"image-{fingerprint}"
    return _fitted(folder, _CODEBOOK_FILE, lambda: _fit_codebook(images), NUM_CODES)


def _fingerprint(data: bytes, settings: Mapping[str, int]) -> str:
    digest = hashlib.sha256(json.dumps({"version": _VERSION, **settings}).encode())
    digest.update(data)
    return digest.hexdigest()[:12]


def _fitted(folder: pathlib.Path, name: str, fit: Callable[[], bytes], size: int) -> str:
    """Returns the path of a fitted file; fits and writes its folder if it is not there."""
    manifest = folder / _MANIFEST_FILE
    if not manifest.exists():
        logging.getLogger(__name__).info("fitting %s", folder / name)
        _write_folder(folder, name, fit(), size)
    try:
        expected = json.loads(manifest.read_text())["sha256"]
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    except (OSError, ValueError, KeyError) as error:
        raise UserError("a file fitted to the quickstart's data cannot be read", got=error,
                        fix=f"delete {folder}: it is fitted again") from error
    if found != expected:
        raise UserError("a file fitted to the quickstart's data was changed or damaged",
                        got=f"{folder / name}: sha256 {found[:12]}, written as {expected[:12]}",
                        fix=f"delete {folder} and the cached quickstart tasks: they are made again")
    return str(folder / name)


def _write_folder(folder: pathlib.Path, name: str, content: bytes, size: int) -> None:
    manifest = {"file": name, "sha256": hashlib.sha256(content).hexdigest(), "size": size}
    temporary: str | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)
        os.chmod(temporary, 0o755)  # mkdtemp's 0700 would hide a shared cache from its readers.
        for file, data in ((name, content), (_MANIFEST_FILE, json.dumps(manifest).encode())):
            with open(os.path.join(temporary, file), "wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
        try:
            os.rename(temporary, folder)
        except OSError:
            # Renaming onto a folder with files in it fails: another process was first.
            if not (folder / _MANIFEST_FILE).exists():
                raise
    except OSError as error:
        raise UserError("the quickstart's vocabulary and codebook cannot be written",
                        got=error, fix="set VISHWAM_CACHE_DIR to a folder that can be written"
                        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _fit_vocabulary(sentences: list[str]) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    # One thread: the order of additions decides the last digits of the scores. No file names: they
    # would be written into the model.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=VOCABULARY_SIZE,
        model_type="unigram", byte_fallback=True, character_coverage=1.0, num_threads=1,
        max_sentence_length=1 << 20, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>",
        eos_piece="</s>", unk_piece="<unk>", minloglevel=2)
    return model.getvalue()


def _fit_codebook(images: np.ndarray) -> bytes:
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    patches = to_patches(images, PATCH).reshape(-1, PATCH * PATCH).astype(np.float64)
    with threadpool_limits(limits=1):  # as above: one order of additions
        centres = KMeans(NUM_CODES, n_init=4, random_state=0).fit(patches).cluster_centers_
    # Rounded, so that what is left of such differences does not reach the file.
    centres = np.round(np.clip(centres, 0.0, 1.0), 5).astype(np.float32)
    order = np.lexsort((*centres.T, centres.sum(1)))
    out = io.BytesIO()
    np.save(out, centres[order])
    return out.getvalue()
