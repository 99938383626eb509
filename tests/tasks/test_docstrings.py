"""The task of docstrings and their packages: what it reads, and that no text is in two splits."""

from __future__ import annotations

import collections

import seqio

from vishwam_t5x_tasks import docstrings


def test_first_paragraphs(tmp_path):
    file = tmp_path / "a.py"
    file.write_text('"""The module\'s own is not read."""\n'
                    'class A:\n    """One\n    two  three four.\n\n    More."""\n'
                    '    async def f(self):\n        """Too short."""\n'
                    f'def g():\n    """{"word " * 40}"""\ndef h(): pass\n')
    assert sorted(docstrings.first_paragraphs(file)) == [
        "One two three four.", " ".join(["word"] * docstrings.MAX_WORDS)]


def test_no_text_is_in_two_splits_and_every_package_is_in_each():
    task = seqio.TaskRegistry.get("docstring_package")
    seen: set[bytes] = set()
    for split in docstrings.SPLITS:
        pairs = [(example["text_inputs"], example["text_targets"])
                 for example in task.source.get_dataset(split).as_numpy_iterator()]
        texts = {text for text, _ in pairs}
        assert len(texts) == len(pairs) and not seen & texts
        counts = collections.Counter(name.decode() for _, name in pairs)
        assert set(counts) == set(docstrings.PACKAGES)
        assert max(counts.values()) < 0.25 * len(pairs), "no answer is right by being common"
        seen |= texts
