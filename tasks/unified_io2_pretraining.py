"""The corpora of Unified-IO 2's pretraining as a Mixture, put together from Tasks of yours.

Unified-IO 2 (Lu et al. 2023, arXiv:2312.17172) was pretrained on public corpora, most of which
nobody may redistribute, so this module holds names and rates, and no data. A module of yours
registers a Task for each corpus you have, under the name `CORPORA` gives it with the features it
names (tasks/README.md says how in twenty lines); name it before this one:

    MIXTURE_OR_TASK_MODULE = ('my_corpora', 'vishwam_t5x_tasks.unified_io2_pretraining')

The Mixture `unified_io2_pretraining` has the corpora that are registered, and says which are not;
`VISHWAM_PRETRAINING_CORPORA=c4,cc12m` asks for exactly those.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import seqio
from absl import logging

from vishwam_t5x.core.errors import UserError, did_you_mean
from vishwam_t5x.data.tf.multimodal_mixture import MultimodalMixture

NAME = "unified_io2_pretraining"
CORPORA_VARIABLE = "VISHWAM_PRETRAINING_CORPORA"


class Corpus(NamedTuple):
    """A corpus and its part of the mixture.

    Attributes:
        name: of the Task.
        features: what its examples have; the mixture of denoisers corrupts them on read.
        share: of the examples read, out of those of all corpora.
    """

    name: str
    features: tuple[str, ...]
    share: float


_TEXT = ("text",)
_CAPTIONED = ("image", "image_codes", "text")
_VIDEO = ("image_history", "audio_history", "text")
_SOUND = ("audio", "text")

CORPORA = (
    # Text: the authors thank MosaicML for the mixture. Within the third that is text, shares are
    # those that MosaicML published for MPT-7B (2023); that these are the same is A GUESS.
    Corpus("mc4_en", _TEXT, 0.33 / 3), Corpus("c4", _TEXT, 0.299 / 3),
    Corpus("redpajama_common_crawl", _TEXT, 0.1 / 3), Corpus("the_stack", _TEXT, 0.1 / 3),
    Corpus("wikipedia", _TEXT, 0.04 / 3), Corpus("the_stack_markdown", _TEXT, 0.035 / 3),
    Corpus("s2orc", _TEXT, 0.033 / 3), Corpus("books", _TEXT, 0.03 / 3),
    Corpus("arxiv", _TEXT, 0.019 / 3), Corpus("stack_exchange", _TEXT, 0.014 / 3),
    # Images with text. A GUESS: four tenths, by the sizes of the corpora.
    Corpus("laion_400m", _CAPTIONED, 0.25), Corpus("cc12m", _CAPTIONED, 0.08),
    Corpus("redcaps", _CAPTIONED, 0.05), Corpus("cc3m", _CAPTIONED, 0.02),
    # Video and sound. A GUESS: the rest.
    Corpus("yt_temporal_1b", _VIDEO, 0.1), Corpus("hd_vila_10m", _VIDEO, 0.05),
    Corpus("webvid_10m", _VIDEO, 0.05), Corpus("acav_100m", _VIDEO, 0.04),
    Corpus("audioset", _SOUND, 0.0267),
)


def chosen(registered: Iterable[str], asked: str | None = None) -> list[Corpus]:
    """Returns the corpora of the mixture.

    Args:
        registered: names of the Tasks there are.
        asked: names of corpora joined by commas, all of which must be there; None: all there are.

    Raises:
        UserError: a name that is no corpus of the table, an asked one without a Task, or no Task
            at all.
    """
    there = set(registered)
    names = [corpus.name for corpus in CORPORA]
    if asked is None:
        found = [corpus for corpus in CORPORA if corpus.name in there]
        missing = [name for name in names if name not in there]
        if found and missing:
            logging.warning("%s goes without %s: no Task of that name", NAME, ", ".join(missing))
    else:
        wanted = [name.strip() for name in asked.split(",") if name.strip()]
        for name in wanted:
            if name not in names:
                raise UserError(f"{CORPORA_VARIABLE} names an unknown corpus", got=name,
                                fix=did_you_mean(name, names) or "one of: " + ", ".join(names))
        missing = [name for name in wanted if name not in there]
        if missing:
            raise UserError(f"{CORPORA_VARIABLE} asks for corpora that no Task gives",
                            got=", ".join(missing), fix=_FIX)
        found = [corpus for corpus in CORPORA if corpus.name in wanted]
    if not found:
        raise UserError(f"the mixture '{NAME}' has no corpus",
                        got=f"no Task is named {', '.join(names[:3])}, …", fix=_FIX)
    return found


_FIX = ("register them in a module of yours and name it first: MIXTURE_OR_TASK_MODULE = "
        f"('my_corpora', 'vishwam_t5x_tasks.{NAME}')")


def check_features(corpora: Sequence[Corpus]) -> None:
    """Raises `UserError` where a Task lacks a feature its corpus is to have."""
    for corpus in corpora:
        features = seqio.TaskRegistry.get(corpus.name).output_features
        if missing := [name for name in corpus.features if name not in features]:
            raise UserError(f"the Task '{corpus.name}' lacks features of its corpus",
                            got=f"it has {', '.join(sorted(features))}",
                            fix="add " + ", ".join(missing))


def register() -> list[Corpus]:
    """Registers the Mixture of the Tasks there are, and returns its corpora.

    Raises:
        UserError: as `chosen` and `check_features`.
    """
    corpora = chosen(seqio.TaskRegistry.names(), os.environ.get(CORPORA_VARIABLE))
    check_features(corpora)
    seqio.MixtureRegistry.add(NAME, [(corpus.name, corpus.share) for corpus in corpora],
                              mixture_cls=MultimodalMixture)
    return corpora


# This module is imported with all others where none is named: it must not mind having no corpus.
if CORPORA_VARIABLE in os.environ or {c.name for c in CORPORA} & set(seqio.TaskRegistry.names()):
    register()
