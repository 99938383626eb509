"""The task of putting vowels back: what it asks, and that no sentence is in two splits."""

from __future__ import annotations

import seqio

from vishwam_t5x_tasks import quickstart_sources as sources
from vishwam_t5x_tasks import vowels


def test_pieces_are_sentences_of_words():
    passage = ("The expression is evaluated first. Call f(x) and be done with it now. Too short. "
               + " ".join(["word"] * 25))
    found = list(vowels.pieces([passage]))
    assert found[0] == "The expression is evaluated first."
    assert [len(piece.split()) for piece in found[1:]] == [8, 8, 9], "cut evenly; code left out"
    assert vowels.without_vowels("A name in a class, I say") == "A nm n a clss, I sy"
    assert vowels.without_vowels(found[0]) == "Th xprssn s vltd frst."


def test_no_sentence_is_in_two_splits():
    task = seqio.TaskRegistry.get("restore_vowels")
    seen: set[bytes] = set()
    for split in sources.SPLITS:
        pairs = [(example["text_inputs"], example["text_targets"])
                 for example in task.source.get_dataset(split).as_numpy_iterator()]
        targets = {target for _, target in pairs}
        assert len(targets) == len(pairs) > 100 and not seen & targets
        assert all(vowels.without_vowels(target.decode()) == given.decode()
                   for given, target in pairs)
        seen |= targets
