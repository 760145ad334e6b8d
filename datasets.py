"""The four synthetic data sets of the paper's section 4.1 and of the authors' demo.

Labels are classes 0 (negative) and 1 (positive). Label noise flips a fixed number of the labels
of each split; the clean labels are kept beside the noisy ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from settings import DataSettings

GAUSSIAN_DIMENSIONS = 10
GAUSSIAN_SHIFT = 1.0  # m: the negative mean is (m, ..., m), the positive mean the origin
SINUSOID_DIMENSIONS = 10
SINUSOID2D_RADIUS = 2.0
SINUSOID2D_FREQUENCY = 1.5  # the length of both w and w'


@dataclass(frozen=True)
class Split:
    """n examples: `inputs` [n, d] float32, `labels` (noisy) and `clean_labels` [n] int64."""

    inputs: np.ndarray
    labels: np.ndarray
    clean_labels: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """The three splits of one draw of a data set."""

    train: Split
    val: Split
    test: Split


def make_dataset(settings: DataSettings, seed: int) -> Dataset:
    """Draw the three splits, each from a child stream of its own made from the seed.

    Inputs and flipped labels have streams of their own too, so neither the size of one split nor
    the label noise changes anything else. [released code for the formulas and sizes; the random
    streams are this project's]
    """
    train, val, test = (
        _make_split(settings, samples, stream)
        for samples, stream in zip(
            (settings.train_samples, settings.val_samples, settings.test_samples),
            np.random.SeedSequence(seed).spawn(3),
        )
    )
    return Dataset(train, val, test)


def _make_split(settings: DataSettings, samples: int, stream: np.random.SeedSequence) -> Split:
    generator, noise_generator = (np.random.default_rng(child) for child in stream.spawn(2))
    if settings.dataset == "sinusoid2d":
        inputs, labels = _sinusoid2d(samples, generator)
    elif settings.dataset == "sinusoid":
        inputs, labels = _sinusoid(samples, generator)
    elif settings.dataset == "gaussian":
        inputs, labels = _gaussian(samples, generator)
    else:
        inputs, labels = _spiral(samples, settings.spiral_noise, generator)
    labels = labels.astype(np.int64)
    noisy = flip_labels(labels, settings.label_noise, noise_generator)
    return Split(inputs.astype(np.float32), noisy, labels)


def flip_labels(
    labels: np.ndarray, label_noise: float, generator: np.random.Generator
) -> np.ndarray:
    """Return a copy with exactly int(label_noise * n) labels flipped. [released code]"""
    flipped = generator.permutation(len(labels))[: int(label_noise * len(labels))]
    noisy = labels.copy()
    noisy[flipped] = 1 - noisy[flipped]
    return noisy


def _sinusoid2d(samples: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    # Two coordinates of a point on the unit sphere of R^4 are uniform in the unit disc.
    sphere = generator.standard_normal((samples, 4))
    sphere /= np.linalg.norm(sphere, axis=1, keepdims=True)
    inputs = SINUSOID2D_RADIUS * sphere[:, 2:]
    return inputs, true_boundary("sinusoid2d", inputs) > 0


def _sinusoid(samples: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    inputs = 2 * generator.standard_normal((samples, SINUSOID_DIMENSIONS))
    return inputs, inputs[:, 0] + np.sin(inputs[:, 1]) > 0


def _class_sizes(samples: int) -> tuple[int, int]:
    """Positive and negative examples: halves, the odd one positive."""
    return samples - samples // 2, samples // 2


def _gaussian(samples: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    labels = np.repeat([1, 0], _class_sizes(samples))
    inputs = generator.standard_normal((samples, GAUSSIAN_DIMENSIONS))
    inputs[labels == 0] += GAUSSIAN_SHIFT
    return inputs, labels


def _spiral(
    samples: int, spiral_noise: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    positive, negative = (np.linspace(0, 4 * np.pi, size) for size in _class_sizes(samples))
    angle = np.concatenate([positive, negative])
    radius = np.concatenate([positive, negative + np.pi])
    arms = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    labels = np.repeat([1, 0], _class_sizes(samples))
    return arms + spiral_noise * generator.standard_normal((samples, 2)), labels


def true_boundary(dataset: str, inputs: np.ndarray) -> np.ndarray:
    """Return a score [n] of inputs [n, 2]: 0 on the true boundary, positive in class 1.

    The boundary of `sinusoid2d` is its labels' own; that of `spiral`, whose labels are defined
    on the arms alone, is the line midway between them: at angle t the positive arm has the
    radii t + 2 pi k, the negative one those plus pi.
    """
    x1, x2 = inputs.T
    if dataset == "sinusoid2d":
        return SINUSOID2D_FREQUENCY * x1 + np.sin(SINUSOID2D_FREQUENCY * x2)
    return np.cos(np.hypot(x1, x2) - np.arctan2(x2, x1))


def bayes_accuracy(settings: DataSettings) -> float:
    """Return the test accuracy of the best classifier of the clean labels, on the noisy ones.

    a (1 - rho) + (1 - a) rho, with rho the share of flipped labels and a the accuracy on clean
    labels: Phi(|mu_N| / 2) for `gaussian`, 1 where the classes do not overlap, NaN where they
    do and a is not known (the spiral with noise around its arms).
    """
    clean = 1.0
    if settings.dataset == "gaussian":
        distance = GAUSSIAN_SHIFT * math.sqrt(GAUSSIAN_DIMENSIONS)
        clean = 0.5 * (1 + math.erf(distance / 2 / math.sqrt(2)))
    elif settings.dataset == "spiral" and settings.spiral_noise > 0:
        clean = math.nan
    flipped = int(settings.label_noise * settings.test_samples) / settings.test_samples
    return clean * (1 - flipped) + (1 - clean) * flipped
