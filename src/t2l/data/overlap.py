"""Which inputs of one task occur in another: the measures behind the frozen split and behind `t2l data check`.

Knows texts and arrays. Knows nothing of files and splits.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
HashArray = npt.NDArray[np.uint64]

# Five words, because inputs are short (in three tasks of ten half of them have fewer than 17 words). Against 8-grams,
# 5-grams also find siblings whose questions are 6 to 10 words long or slightly reworded (web questions, tomqa stories,
# winobias sentences), and the pairs that they add have, as far as names tell, the same source rather than a common
# template. Half of an input's grams: less would count a shared phrase, more would miss a shared text with another
# question.
GRAM_WORDS = 5
CONTAINMENT = 0.5
MAX_SHARED = 0.05


@dataclass(frozen=True)
class Corpus:
    """All inputs of all tasks as hashes: one entry of ``owner``, ``whole``, ``scored`` and ``lengths`` an input.

    ``words`` holds the hashes of the words of all inputs, one input after the other.
    """

    tasks: list[str]
    owner: IntArray
    scored: npt.NDArray[np.bool_]
    whole: HashArray
    words: HashArray
    lengths: IntArray


@dataclass(frozen=True)
class Hits:
    """The inputs of one task that occur elsewhere: ``inputs[i]`` occurs in task number ``tasks[i]``."""

    inputs: IntArray
    tasks: IntArray


class Overlap:
    """Which inputs of a task occur in which other tasks, by each measure."""

    def __init__(self, corpus: Corpus, queries: Iterable[str]) -> None:
        self.corpus = corpus
        self.number = {name: number for number, name in enumerate(corpus.tasks)}
        numbers = sorted(self.number[name] for name in queries)
        self.hits = {
            "exact": find_hits(corpus, *whole_inputs(corpus), numbers),
            "ngram": find_hits(corpus, *word_grams(corpus, GRAM_WORDS), numbers),
        }
        self.shares = {
            measure: {number: share_with_each(corpus, number, hits) for number, hits in of_task.items()}
            for measure, of_task in self.hits.items()
        }

    def share(self, task: str, other: str) -> float:
        """The share of ``task``'s inputs, or test inputs, that occur in ``other``: whatever gives most."""
        return max(float(shares[self.number[task]][self.number[other]]) for shares in self.shares.values())


def normalise(text: str) -> str:
    """Lower case, words separated by one space, no punctuation; a text of punctuation alone stays as it is."""
    return re.sub(r"[\W_]+", " ", text.lower()).strip() or text


def hash64(text: str) -> int:
    """The first 64 bits of a text's SHA-1: the same on every machine, unlike ``hash``."""
    return int.from_bytes(hashlib.sha1(text.encode(), usedforsecurity=False).digest()[:8], "little")


def build_corpus(examples: Iterable[tuple[str, str, bool]]) -> Corpus:
    """Hash ``(task, input, is it scored)`` triples."""
    rows = list(examples)
    tasks = sorted({task for task, _, _ in rows})
    number = {name: position for position, name in enumerate(tasks)}
    vocabulary: dict[str, int] = {}
    whole, words, lengths = [], [], []
    for _, text, _ in rows:
        plain = normalise(text)
        split = plain.split()
        for word in split:
            if word not in vocabulary:
                vocabulary[word] = hash64(word)
        whole.append(hash64(plain))
        words.append(np.fromiter((vocabulary[word] for word in split), np.uint64, len(split)))
        lengths.append(len(split))
    return Corpus(
        tasks=tasks,
        owner=np.array([number[task] for task, _, _ in rows], dtype=np.int64),
        scored=np.array([scored for _, _, scored in rows], dtype=bool),
        whole=np.array(whole, dtype=np.uint64),
        words=np.concatenate(words),
        lengths=np.array(lengths, dtype=np.int64),
    )


def whole_inputs(corpus: Corpus) -> tuple[IntArray, IntArray]:
    """The exact measure as grams: every input has one, itself. Returns the inputs and their grams' numbers."""
    _, grams = np.unique(corpus.whole, return_inverse=True)
    return np.arange(len(corpus.whole)), grams.astype(np.int64)


def word_grams(corpus: Corpus, size: int) -> tuple[IntArray, IntArray]:
    """Every distinct (input, word gram) pair, the grams numbered; an input that is too short is its own gram."""
    ends = np.cumsum(corpus.lengths)
    input_of_word = np.repeat(np.arange(len(ends)), corpus.lengths)
    starts = np.flatnonzero(np.arange(len(corpus.words)) + size <= ends[input_of_word])
    rolling = np.zeros(len(starts), dtype=np.uint64)
    for offset in range(size):
        rolling = rolling * np.uint64(0x9E3779B97F4A7C15) + corpus.words[starts + offset]
    short = np.flatnonzero(corpus.lengths < size)
    inputs = np.concatenate([input_of_word[starts], short])
    distinct, grams = np.unique(np.concatenate([rolling, corpus.whole[short]]), return_inverse=True)
    pairs = np.unique(inputs * len(distinct) + grams)
    return pairs // len(distinct), pairs % len(distinct)


def find_hits(corpus: Corpus, inputs: IntArray, grams: IntArray, queries: Sequence[int]) -> dict[int, Hits]:
    """For each queried task, which of its inputs have enough of their grams in one other task.

    ``inputs`` is sorted. Each gram of the task is looked up in an index from grams to the tasks that have it, so the
    cost follows the grams that are shared at all, not the number of pairs of tasks.
    """
    n_tasks = len(corpus.tasks)
    index = np.unique(grams * n_tasks + corpus.owner[inputs])
    tasks_of_gram = np.bincount(index // n_tasks, minlength=int(grams.max()) + 1)
    first = np.cumsum(tasks_of_gram) - tasks_of_gram
    grams_of_input = np.bincount(inputs, minlength=len(corpus.owner))
    by_task = np.argsort(corpus.owner[inputs], kind="stable")
    bounds = np.searchsorted(corpus.owner[inputs][by_task], np.arange(n_tasks + 1))
    hits = {}
    for query in queries:
        mine = by_task[bounds[query] : bounds[query + 1]]
        mine = mine[tasks_of_gram[grams[mine]] > 1]
        counts = tasks_of_gram[grams[mine]]
        entry = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        entry += np.repeat(first[grams[mine]], counts)
        keys, shared = np.unique(np.repeat(inputs[mine], counts) * n_tasks + index[entry] % n_tasks, return_counts=True)
        enough = (shared >= CONTAINMENT * grams_of_input[keys // n_tasks]) & (keys % n_tasks != query)
        hits[query] = Hits(inputs=keys[enough] // n_tasks, tasks=keys[enough] % n_tasks)
    return hits


def share_with_each(corpus: Corpus, task: int, hits: Hits) -> npt.NDArray[np.float64]:
    """Per other task, the share of the task's inputs found there: of all, or of the scored ones if that is more.

    Scored inputs count on their own because they are a tenth of all and decide the result.
    """
    mine = corpus.owner == task
    found = np.bincount(hits.tasks, minlength=len(corpus.tasks)) / mine.sum()
    if not (mine & corpus.scored).any():
        return found
    scored = np.bincount(hits.tasks[corpus.scored[hits.inputs]], minlength=len(corpus.tasks))
    return np.maximum(found, scored / (mine & corpus.scored).sum())
