"""The synthetic data sets: the three of demo and table, and the released ten-dimensional sinusoid.

Each is said in one place: its entry in DATASETS. Labels are classes 0 (negative) and 1 (positive).
Label noise flips a fixed number of each split's labels; the clean ones are kept beside the noisy.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Annotated, Literal

import numpy as np
from numpy.random import Generator

from settings import SPLITS, Count, check, check_counts, fill, flag

GAUSSIAN_DIMENSIONS = 10
GAUSSIAN_SHIFT = 1.0  # m: the negative mean is (m, ..., m), the positive mean the origin
SINUSOID_DIMENSIONS = 10
SINUSOID2D_RADIUS = 2.0
SINUSOID2D_FREQUENCY = 1.5  # the length of both w and w'

Drawn = tuple[np.ndarray, np.ndarray]  # inputs [n, d] and clean labels [n]


@dataclass(frozen=True)
class Split:
    """n examples: `inputs` [n, d] float32, `noisy_labels` and `clean_labels` [n] int64."""

    inputs: np.ndarray
    noisy_labels: np.ndarray
    clean_labels: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """The three splits of one draw of a data set."""

    train: Split
    val: Split
    test: Split


@dataclass(frozen=True)
class Source:
    """All that this project knows of a data set.

    Args:
        samples: the authors' size of the training, and of the validation split, in all.
        draw: returns n inputs and clean labels from (n, spiral_noise, generator).
        boundary: a score [n] of inputs [n, 2], 0 on the true boundary and positive in class 1;
            None where the inputs are not in the plane.
        best_accuracy: the best possible accuracy on clean labels, a fraction, with no spiral_noise.
    """

    samples: int
    draw: Callable[[int, float, Generator], Drawn]
    boundary: Callable[[np.ndarray], np.ndarray] | None
    best_accuracy: float


def _sinusoid2d(samples: int, _spiral_noise: float, generator: Generator) -> Drawn:
    # Two coordinates of a point on the unit sphere of R^4 are uniform in the unit disc.
    sphere = generator.standard_normal((samples, 4))
    sphere /= np.linalg.norm(sphere, axis=1, keepdims=True)
    inputs = SINUSOID2D_RADIUS * sphere[:, 2:]
    return inputs, _sinusoid2d_boundary(inputs) > 0


def _sinusoid2d_boundary(inputs: np.ndarray) -> np.ndarray:
    x1, x2 = inputs.T
    return SINUSOID2D_FREQUENCY * x1 + np.sin(SINUSOID2D_FREQUENCY * x2)


def _sinusoid(samples: int, _spiral_noise: float, generator: Generator) -> Drawn:
    inputs = 2 * generator.standard_normal((samples, SINUSOID_DIMENSIONS))
    return inputs, inputs[:, 0] + np.sin(inputs[:, 1]) > 0


def _halves(samples: int) -> np.ndarray:
    """Labels of both classes, first the positive ones; an odd one is positive."""
    return np.repeat([1, 0], [samples - samples // 2, samples // 2])


def _gaussian(samples: int, _spiral_noise: float, generator: Generator) -> Drawn:
    labels = _halves(samples)
    inputs = generator.standard_normal((samples, GAUSSIAN_DIMENSIONS))
    inputs[labels == 0] += GAUSSIAN_SHIFT
    return inputs, labels


def _spiral(samples: int, spiral_noise: float, generator: Generator) -> Drawn:
    labels = _halves(samples)
    angle = np.concatenate([np.linspace(0, 4 * np.pi, (labels == k).sum()) for k in (1, 0)])
    radius = angle + np.pi * (labels == 0)
    arms = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return arms + spiral_noise * generator.standard_normal((samples, 2)), labels


def _spiral_boundary(inputs: np.ndarray) -> np.ndarray:
    """The line midway between the arms; labels are defined on the arms alone.

    At angle t the positive arm has the radii t + 2 pi k, the negative one those plus pi.
    """
    x1, x2 = inputs.T
    return np.cos(np.hypot(x1, x2) - np.arctan2(x2, x1))


HALF_DISTANCE = GAUSSIAN_SHIFT * math.sqrt(GAUSSIAN_DIMENSIONS) / 2  # of the Gaussians' means
# The released code counts `gaussian` and `spiral` per class: 100, and 10 000 to test.
DATASETS = {
    "sinusoid2d": Source(100, _sinusoid2d, _sinusoid2d_boundary, 1.0),
    "sinusoid": Source(100, _sinusoid, None, 1.0),
    "gaussian": Source(200, _gaussian, None, NormalDist().cdf(HALF_DISTANCE)),
    "spiral": Source(200, _spiral, _spiral_boundary, 1.0),
}
DatasetName = Literal[tuple(DATASETS)]
SIZES = tuple(f"{split}_samples" for split in SPLITS)
SplitSize = Annotated[int | None, flag("N", "(default: 100; gaussian and spiral 200)")]


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a data set is made from; together with the seed it fixes every bit of it."""

    dataset: DatasetName
    """data set"""
    label_noise: Annotated[float, flag("FRACTION")]
    """fraction of labels that is flipped: int(FRACTION * n) of the n labels of each split"""
    spiral_noise: Annotated[float, flag("TAU")] = 0.0
    """standard deviation of the points around the arms of the spiral (the paper's tau)"""
    train_samples: SplitSize = None
    """training examples in all"""
    val_samples: SplitSize = None
    """validation examples in all"""
    test_samples: Count = 20_000
    """test examples in all"""

    def __post_init__(self) -> None:
        name, noise, tau = self.dataset, self.label_noise, self.spiral_noise
        check(name in DATASETS, "dataset", repr(name), f"one of {', '.join(DATASETS)}")
        check(0 <= noise < 1, "label_noise", noise, "a fraction in [0, 1)")
        check(0 <= tau < math.inf, "spiral_noise", tau, "a finite number >= 0")
        check(tau == 0 or name == "spiral", "spiral_noise", tau, "only with the spiral")
        check_counts(self, *SIZES)

    def filled(self) -> "Data":
        """Return a copy that has the authors' sizes of the splits where none are said."""
        samples = DATASETS[self.dataset].samples
        return fill(self, train_samples=samples, val_samples=samples)

    def __str__(self) -> str:
        spiral = f", spiral noise {self.spiral_noise:g}" if self.spiral_noise else ""
        return f"{self.dataset}, label noise {self.label_noise:g}{spiral}"


def name_of(dataset: str, spiral_noise: float) -> str:
    """Return a data set in words."""
    return f"{dataset}, τ = {spiral_noise:g}" if spiral_noise else dataset


def make_dataset(data: Data, seed: int) -> Dataset:
    """Draw the three splits, each from a child stream of its own made from the seed.

    Of a split's n labels exactly int(label_noise * n) are flipped. [released code] Inputs and
    flipped labels have streams of their own too, so neither the size of one split nor the label
    noise changes anything else. [released code for formulas and sizes, not for streams]
    """
    data = data.filled()
    draw = DATASETS[data.dataset].draw
    splits = []
    for size, stream in zip(SIZES, np.random.SeedSequence(seed).spawn(len(SIZES))):
        inputs_stream, noise_stream = map(np.random.default_rng, stream.spawn(2))
        inputs, labels = draw(getattr(data, size), data.spiral_noise, inputs_stream)
        clean_labels = labels.astype(np.int64)
        noisy_labels = clean_labels.copy()
        flipped = noise_stream.permutation(len(labels))[: int(data.label_noise * len(labels))]
        noisy_labels[flipped] ^= 1
        splits.append(Split(inputs.astype(np.float32), noisy_labels, clean_labels))
    return Dataset(*splits)


def best_possible_accuracy(data: Data, label_noise: float) -> float:
    """Return the test accuracy of the best classifier of the clean labels; NaN if not known.

    With a its value on clean labels and rho the share of the test split that `label_noise` flips
    (0 for the clean labels), it is a (1 - rho) + (1 - a) rho.
    """
    if data.spiral_noise:
        return math.nan  # the arms of the spiral overlap
    clean = DATASETS[data.dataset].best_accuracy
    flipped = int(label_noise * data.test_samples) / data.test_samples
    return clean * (1 - flipped) + (1 - clean) * flipped
