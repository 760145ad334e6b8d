"""The four synthetic data sets of the paper's section 4.1 and of the authors' demo.

Labels are classes 0 (negative) and 1 (positive). Label noise flips a fixed number of the labels
of each split; the clean labels are kept beside the noisy ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

GAUSSIAN_DIMENSIONS = 10
GAUSSIAN_SHIFT = 1.0  # m: the negative mean is (m, ..., m), the positive mean the origin
SINUSOID_DIMENSIONS = 10
SINUSOID2D_RADIUS = 2.0
SINUSOID2D_FREQUENCY = 1.5  # the length of both w and w'

# Examples in all, of train, validation and test. The released code counts `gaussian` and
# `spiral` per class: 100, 100 and 10 000.
DEFAULT_SAMPLES = {
    "sinusoid2d": (100, 100, 20_000),
    "sinusoid": (100, 100, 20_000),
    "gaussian": (200, 200, 20_000),
    "spiral": (200, 200, 20_000),
}


@dataclass(frozen=True)
class DataSettings:
    """What a data set is made from; together with the seed it fixes every bit of it.

    Sample counts are examples in all; None is the authors' size. `label_noise` is the fraction
    of labels flipped, `spiral_noise` the standard deviation (the paper's tau) around the arms.

    Raises:
        ValueError: the data set is unknown, or a value is outside what is said above.
    """

    dataset: str
    label_noise: float
    spiral_noise: float = 0.0
    train_samples: int | None = None
    val_samples: int | None = None
    test_samples: int | None = None

    def __post_init__(self) -> None:
        if self.dataset not in DEFAULT_SAMPLES:
            raise ValueError(f"dataset {self.dataset!r}: one of {', '.join(DEFAULT_SAMPLES)}")
        if not 0 <= self.label_noise < 1:
            raise ValueError(f"label_noise {self.label_noise}: a fraction in [0, 1)")
        if not 0 <= self.spiral_noise < math.inf:
            raise ValueError(f"spiral_noise {self.spiral_noise}: a finite number >= 0")
        for split, default in zip(("train", "val", "test"), DEFAULT_SAMPLES[self.dataset]):
            name = f"{split}_samples"
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1")


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
    x1, x2 = SINUSOID2D_FREQUENCY * inputs.T
    return inputs, x1 + np.sin(x2) > 0


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


def gaussian_posterior(inputs: np.ndarray, label_noise: float = 0.0) -> np.ndarray:
    """Return p(label = 1 | x), shape [n], of `gaussian` at inputs [n, d], in closed form.

    With equal class priors log p(1|x)/p(0|x) = d m^2 / 2 - m (x_1 + ... + x_d); flipping labels
    at random with probability `label_noise` mixes the two posteriors.
    """
    inputs = np.asarray(inputs, dtype=np.float64)
    logit = GAUSSIAN_SHIFT * (inputs.shape[1] * GAUSSIAN_SHIFT / 2 - inputs.sum(axis=1))
    clean = 0.5 * (1 + np.tanh(logit / 2))  # the logistic function, without overflow
    return clean * (1 - label_noise) + (1 - clean) * label_noise


def gaussian_bayes_accuracy(label_noise: float = 0.0) -> float:
    """Return the accuracy of the best classifier of the clean labels of `gaussian`.

    Phi(|mu_N| / 2) on the clean labels, a; a (1 - rho) + (1 - a) rho against labels of which a
    fraction rho = `label_noise` is flipped.
    """
    distance = GAUSSIAN_SHIFT * math.sqrt(GAUSSIAN_DIMENSIONS)
    clean = 0.5 * (1 + math.erf(distance / 2 / math.sqrt(2)))
    return clean * (1 - label_noise) + (1 - clean) * label_noise
