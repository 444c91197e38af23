"""From sentences to articulator movements: durations, targets, coarticulation.

Phones are described by the positions of articulators (place, manner, voicing, height, backness,
rounding …). A phone that leaves an articulator free (``.`` in the table) takes the position its
neighbours ask for, after the dominance model of Cohen and Massaro (1993). Articulators then move
to their targets as critically damped springs (Saltzman and Munhall 1989, task dynamics).
"""

from dataclasses import dataclass

import numpy as np

from b2t.data.phonemes import PHONEMES, SIL, pronounce, to_ids, words_of

BIN_SECONDS = 0.02
"""Width of a time bin in seconds, as in the T12 and T15 releases."""

# A phone of two rows moves from the first target to the second (diphthongs, affricates).
_TABLE = """
phone voice lips round teeth tip blade dorsum stop fric nasal lateral rhotic glottis high back tense
AA        1    0     0     0   0     0      0    0    0     0       0      0       0   -1   .7    .6
AE        1    0     0     0   0     0      0    0    0     0       0      0       0  -.8  -.8   -.4
AH        1    0     0     0   0     0      0    0    0     0       0      0       0  -.2   .1   -.8
AO        1    0    .7     0   0     0      0    0    0     0       0      0       0  -.5    1    .4
AW        1    0     0     0   0     0      0    0    0     0       0      0       0   -1   .2     0
AW        1    0    .9     0   0     0      0    0    0     0       0      0       0   .6   .9     0
AY        1    0     0     0   0     0      0    0    0     0       0      0       0   -1   .2     0
AY        1    0     0     0   0     0      0    0    0     0       0      0       0   .7  -.8     0
B         1    1     .     0   .     .      .    1    0     0       0      0       0    .    .     .
CH       -1    0    .3     0  .6     1      .    1   .4     0       0      0       0   .4    .     .
CH       -1    0    .3     0  .2     1      .    0    1     0       0      0       0   .4    .     .
D         1    .     .     0   1     .      .    1    0     0       0      0       0   .3    .     .
DH        1    .     .     1  .3     .      .    0   .6     0       0      0       0    .    .     .
EH        1    0     0     0   0     0      0    0    0     0       0      0       0  -.3  -.7   -.5
ER        1    0    .3     0   0     0      0    0    0     0       0      1       0   .1   .2    .3
EY        1    0     0     0   0     0      0    0    0     0       0      0       0   .1  -.8    .6
EY        1    0     0     0   0     0      0    0    0     0       0      0       0   .8   -1    .6
F        -1   .5     .    .8   .     .      .    0    1     0       0      0       0    .    .     .
G         1    .     .     0   .     .      1    1    0     0       0      0       0   .6   .6     .
HH       -1    .     .     0   .     .      .    0   .4     0       0      0       1    .    .     .
IH        1    0     0     0   0     0      0    0    0     0       0      0       0   .6  -.7   -.6
IY        1    0   -.3     0   0    .2      0    0    0     0       0      0       0    1   -1     1
JH        1    0    .3     0  .6     1      .    1   .4     0       0      0       0   .4    .     .
JH        1    0    .3     0  .2     1      .    0    1     0       0      0       0   .4    .     .
K        -1    .     .     0   .     .      1    1    0     0       0      0       0   .6   .6     .
L         1    .     .     0  .8     .     .3    0    0     0       1      0       0    .   .4     .
M         1    1     .     0   .     .      .   .8    0     1       0      0       0    .    .     .
N         1    .     .     0   1     .      .   .8    0     1       0      0       0   .3    .     .
NG        1    .     .     0   .     .      1   .8    0     1       0      0       0   .6   .6     .
OW        1    0    .6     0   0     0      0    0    0     0       0      0       0  -.1   .9    .6
OW        1    0     1     0   0     0      0    0    0     0       0      0       0   .6    1    .6
OY        1    0    .8     0   0     0      0    0    0     0       0      0       0  -.4    1    .4
OY        1    0     0     0   0     0      0    0    0     0       0      0       0   .7  -.8    .2
P        -1    1     .     0   .     .      .    1    0     0       0      0       0    .    .     .
R         1    .    .5     0  .3    .3      .    0    0     0       0      1       0    .    .     .
S        -1    .     .    .2  .8     .      .    0    1     0       0      0       0   .5    .     .
SH       -1    0    .5     0  .2     1      .    0    1     0       0      0       0   .5    .     .
T        -1    .     .     0   1     .      .    1    0     0       0      0       0   .3    .     .
TH       -1    .     .     1  .3     .      .    0   .7     0       0      0       0    .    .     .
UH        1    0    .5     0   0     0     .2    0    0     0       0      0       0   .6   .7   -.6
UW        1   .2     1     0   0     0     .3    0    0     0       0      0       0    1    1     1
V         1   .5     .    .8   .     .      .    0   .8     0       0      0       0    .    .     .
W         1   .5     1     0   .     .     .6    0    0     0       0      0       0   .8    1     .
Y         1    0   -.2     0   .    .8      .    0    0     0       0      0       0    1   -1    .5
Z         1    .     .    .2  .8     .      .    0   .9     0       0      0       0   .5    .     .
ZH        1    0    .5     0  .2     1      .    0   .9     0       0      0       0   .5    .     .
SIL     -.5    .     .     0   .     .      .    0    0     0       0      0       0  -.2    .     .
"""

ARTICULATORS = tuple(_TABLE.split("\n")[1].split()[1:])
"""Names of the articulators A, in the order of every array of positions."""

_FREE_DOMINANCE = 0.1
_NEIGHBOUR_DOMINANCE = 0.2

_DURATIONS = {
    # class: mean in seconds, shape of the gamma distribution, phones
    "diphthong": (0.26, 12.0, "AW AY EY OW OY"),
    "vowel": (0.22, 10.0, "AA AE AO EH ER IH IY UH UW"),
    "schwa": (0.16, 8.0, "AH"),
    "fricative": (0.20, 10.0, "F S SH TH V Z ZH DH HH"),
    "affricate": (0.21, 12.0, "CH JH"),
    "stop": (0.16, 10.0, "B D G K P T"),
    "nasal": (0.17, 10.0, "M N NG"),
    "approximant": (0.16, 10.0, "L R W Y"),
    "pause": (0.20, 4.0, "SIL"),
}
# Words a minute that the durations above give at the word length of ordinary English.
_REFERENCE_RATE = 67.0
_RATE_SPREAD = 0.1
_PREPARATION = (0.5, 20.0)
_TRAILING = (0.4, 20.0)
_SPRING_SECONDS = {"lips": 0.05, "round": 0.06, "nasal": 0.055, "high": 0.055, "tip": 0.035}
_SPRING_DEFAULT = 0.045


def _read_table() -> tuple[dict[str, list[int]], np.ndarray, np.ndarray]:
    """Rows of each phone, target values [rows, A] and their dominance [rows, A]."""
    rows: dict[str, list[int]] = {}
    values: list[list[float]] = []
    dominance: list[list[float]] = []
    for line in _TABLE.strip().splitlines()[1:]:
        phone, *cells = line.split()
        rows.setdefault(phone, []).append(len(values))
        values.append([0.0 if cell == "." else float(cell) for cell in cells])
        dominance.append([_FREE_DOMINANCE if cell == "." else 1.0 for cell in cells])
    return rows, np.array(values), np.array(dominance)


_ROWS, TARGETS, DOMINANCE = _read_table()


def _duration_table() -> np.ndarray:
    """Mean and gamma shape of every class [41, 2]; the blank has none."""
    table = np.full((len(PHONEMES), 2), np.nan)
    for mean, shape, phones in _DURATIONS.values():
        table[to_ids(phones.split())] = mean, shape
    return table


DURATIONS = _duration_table()


@dataclass(frozen=True)
class Utterance:
    """Timing of one attempted sentence.

    Attributes:
        text: the sentence.
        labels: its class ids with a silence after every word, as the release labels it.
        phones: class ids in time, [S]: the labels between two further silences.
        bins: length of each of them in bins, [S].
    """

    text: str
    labels: tuple[int, ...]
    phones: np.ndarray
    bins: np.ndarray

    @property
    def length(self) -> int:
        """Length in bins."""
        return int(self.bins.sum())

    def frames(self) -> np.ndarray:
        """Class id in every bin, [T]."""
        return np.repeat(self.phones, self.bins)


def time_sentence(text: str, speaking_rate: float, rng: np.random.Generator) -> Utterance:
    """Draw the timing of a sentence attempted at about ``speaking_rate`` words a minute."""
    words = [to_ids(pronounce(word)) for word in words_of(text)]
    labels = [phone for word in words for phone in (*word, SIL)]
    scale = _REFERENCE_RATE / speaking_rate * np.exp(rng.normal(0.0, _RATE_SPREAD))
    mean, shape = DURATIONS[labels].T
    spoken = rng.gamma(shape, scale * mean / shape)
    before = rng.gamma(_PREPARATION[1], _PREPARATION[0] / _PREPARATION[1])
    after = rng.gamma(_TRAILING[1], _TRAILING[0] / _TRAILING[1])
    edges = np.cumsum([0.0, before, *spoken, after]) / BIN_SECONDS
    bins = np.maximum(np.diff(np.rint(edges).astype(int)), 1)
    return Utterance(text, tuple(labels), np.array([SIL, *labels, SIL]), bins)


def movements(
    utterances: list[Utterance], variability: float, rng: np.random.Generator
) -> np.ndarray:
    """Articulator positions and speaking state of utterances, end to end.

    Args:
        utterances: timed sentences.
        variability: standard deviation of each target from one attempt at a phone to the next
            (targets span −1 to 1).
        rng: source of randomness.

    Returns:
        [ΣT, A + 2]: the positions of `ARTICULATORS`, then speech (1 while speaking) and
        preparation (rises before the first phone), each smoothed in time.
    """
    steps = np.concatenate([_target_steps(item, variability, rng) for item in utterances])
    seconds = [_SPRING_SECONDS.get(name, _SPRING_DEFAULT) for name in ARTICULATORS]
    seconds += [0.06, 0.12]
    moved = np.empty_like(steps)
    for spring in sorted(set(seconds)):
        columns = [index for index, value in enumerate(seconds) if value == spring]
        moved[:, columns] = _spring(steps[:, columns], spring)
    return moved


def _target_steps(utterance: Utterance, variability: float, rng: np.random.Generator) -> np.ndarray:
    """Piecewise constant targets of one utterance, [T, A + 2]."""
    rows, lengths = [], []
    for phone, bins in zip(utterance.phones, utterance.bins, strict=True):
        choices = _ROWS[PHONEMES[phone]]
        first = bins // len(choices)
        rows += choices
        lengths += [bins] if len(choices) == 1 else [first, bins - first]
    targets = _coarticulated(np.array(rows))
    targets += rng.normal(0.0, variability, targets.shape)
    targets = np.repeat(targets, lengths, axis=0)
    frames = utterance.frames()
    speech = (frames != SIL).astype(float)
    preparation = np.zeros(len(frames))
    preparation[: utterance.bins[0]] = 1.0
    return np.column_stack([targets, speech, preparation])


def _coarticulated(rows: np.ndarray) -> np.ndarray:
    """Targets of a row sequence, each pulled to its neighbours where it is free, [rows, A]."""
    weight = DOMINANCE[rows]
    pull = weight * TARGETS[rows]
    padded_weight = np.pad(weight, ((1, 1), (0, 0)))
    padded_pull = np.pad(pull, ((1, 1), (0, 0)))
    beside = _NEIGHBOUR_DOMINANCE * (padded_weight[:-2] + padded_weight[2:])
    drawn = _NEIGHBOUR_DOMINANCE * (padded_pull[:-2] + padded_pull[2:])
    return (pull + drawn) / (weight + beside)


def _spring(steps: np.ndarray, seconds: float) -> np.ndarray:
    """Response of a critically damped spring with time constant ``seconds`` to steps [T, A]."""
    lags = np.arange(1, int(np.ceil(8 * seconds / BIN_SECONDS)) + 1)
    edges = np.concatenate([[0], lags]) * BIN_SECONDS / seconds
    settled = 1.0 - (1.0 + edges) * np.exp(-edges)
    kernel = np.diff(settled) / settled[-1]
    padded = np.pad(steps, ((len(kernel) - 1, 0), (0, 0)), mode="edge")
    return sum(
        tap * padded[len(kernel) - 1 - lag : len(padded) - lag] for lag, tap in enumerate(kernel)
    )
