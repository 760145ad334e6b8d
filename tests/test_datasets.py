"""The data sets against their formulas, independently written."""

from __future__ import annotations

import numpy as np
import pytest

from datasets import bayes_accuracy, flip_labels, make_dataset, true_boundary
from settings import DEFAULT_SAMPLES, FIGURES_VERSION, SPLITS, DataSettings, SettingError


def settings(dataset, label_noise=0.1, **changes):
    return DataSettings(dataset, label_noise, **changes)


@pytest.mark.parametrize("dataset", DEFAULT_SAMPLES)
@pytest.mark.parametrize("label_noise", [0.0, 0.01, 0.1, 0.57])
def test_shapes_types_and_exact_count_of_flipped_labels(dataset, label_noise):
    data = make_dataset(settings(dataset, label_noise), seed=1)
    dimensions = 10 if dataset in ("gaussian", "sinusoid") else 2
    for name, samples in zip(SPLITS, DEFAULT_SAMPLES[dataset]):
        split = getattr(data, name)
        assert split.inputs.shape == (samples, dimensions) and split.inputs.dtype == np.float32
        assert split.labels.shape == split.clean_labels.shape == (samples,)
        assert split.labels.dtype == split.clean_labels.dtype == np.int64
        assert set(np.unique(split.labels)) == {0, 1}
        assert (split.labels != split.clean_labels).sum() == int(label_noise * samples)


def test_the_data_are_those_of_the_figures():
    """What other data would change: then FIGURES_VERSION goes up, and these with it."""
    assert FIGURES_VERSION == 1
    flipped = {
        "sinusoid2d": ([16, 54, 65, 75, 94], [14, 37, 51, 71, 82]),
        "spiral": (
            [12, 40, 69, 110, 147, 178, 182, 185, 189, 197],
            [44, 92, 97, 112, 130, 132, 140, 153, 169, 188],
        ),
    }
    for dataset, expected in flipped.items():
        data = make_dataset(settings(dataset, 0.05), seed=0)
        for split, positions in zip((data.train, data.val), expected):
            assert list(np.flatnonzero(split.labels != split.clean_labels)) == positions
    first = make_dataset(settings("gaussian"), seed=0).train.inputs[0, :3]
    np.testing.assert_allclose(first, [0.7859, -0.9200, 1.4716], atol=1e-4)


def test_authors_sizes():
    assert DEFAULT_SAMPLES == {
        "gaussian": (200, 200, 20_000),  # 100, 100 and 10 000 per class
        "spiral": (200, 200, 20_000),
        "sinusoid": (100, 100, 20_000),
        "sinusoid2d": (100, 100, 20_000),
    }


@pytest.mark.parametrize("dataset", DEFAULT_SAMPLES)
def test_class_balance(dataset):
    labels = make_dataset(settings(dataset), seed=2).test.clean_labels
    if dataset in ("gaussian", "spiral"):
        assert labels.sum() == len(labels) / 2
    else:
        assert abs(labels.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(labels))


def test_sinusoid2d():
    split = make_dataset(settings("sinusoid2d"), seed=3).test
    x1, x2 = split.inputs.astype(float).T
    score = 1.5 * x1 + np.sin(1.5 * x2)
    clear = abs(score) > 1e-5
    np.testing.assert_array_equal(split.clean_labels[clear], score[clear] > 0)
    # Uniform in the disc of radius 2: the squared radius is uniform on [0, 4], the angle too.
    radius, angle = np.hypot(x1, x2), np.arctan2(x2, x1)
    assert radius.max() <= 2
    for values, low, high in ((radius**2, 0, 4), (angle, -np.pi, np.pi)):
        share, _ = np.histogram(values, bins=10, range=(low, high))
        np.testing.assert_allclose(share / len(values), 0.1, atol=0.012)


def test_sinusoid():
    split = make_dataset(settings("sinusoid"), seed=3).test
    inputs = split.inputs.astype(float)
    score = inputs[:, 0] + np.sin(inputs[:, 1])
    clear = abs(score) > 1e-5
    np.testing.assert_array_equal(split.clean_labels[clear], score[clear] > 0)
    np.testing.assert_allclose(inputs.mean(axis=0), 0, atol=0.08)
    np.testing.assert_allclose(np.cov(inputs.T), 4 * np.eye(10), atol=0.25)


def test_gaussian():
    split = make_dataset(settings("gaussian"), seed=3).test
    for label, mean in ((1, 0), (0, 1)):
        inputs = split.inputs[split.clean_labels == label]
        np.testing.assert_allclose(inputs.mean(axis=0), mean, atol=0.06)
        np.testing.assert_allclose(np.cov(inputs.T), np.eye(10), atol=0.08)


def test_spiral():
    split = make_dataset(settings("spiral", train_samples=9), seed=3).train
    positive = split.inputs[split.clean_labels == 1]
    negative = split.inputs[split.clean_labels == 0]
    assert len(positive) == 5 and len(negative) == 4
    for k in range(5):
        angle = k * 4 * np.pi / 4
        expected = angle * np.cos(angle), angle * np.sin(angle)
        np.testing.assert_allclose(positive[k], expected, atol=1e-5)
    for k in range(4):
        angle = k * 4 * np.pi / 3
        expected = (angle + np.pi) * np.cos(angle), (angle + np.pi) * np.sin(angle)
        np.testing.assert_allclose(negative[k], expected, atol=1e-5)


def test_spiral_noise():
    clean = make_dataset(settings("spiral"), seed=4).test.inputs
    noisy = make_dataset(settings("spiral", spiral_noise=0.7), seed=4).test.inputs
    np.testing.assert_allclose((noisy - clean).std(axis=0), 0.7, rtol=0.03)
    np.testing.assert_allclose((noisy - clean).mean(axis=0), 0, atol=0.03)


@pytest.mark.parametrize("dataset", DEFAULT_SAMPLES)
def test_same_seed_same_bits_other_seed_other_data(dataset):
    wanted = settings(dataset, spiral_noise=0.5)
    first, again, other = (make_dataset(wanted, seed) for seed in (7, 7, 8))
    for name in SPLITS:
        for field in ("inputs", "labels", "clean_labels"):
            bits = [getattr(getattr(data, name), field) for data in (first, again, other)]
            np.testing.assert_array_equal(bits[0], bits[1])
            if field == "inputs":
                assert not np.array_equal(bits[0], bits[2])


@pytest.mark.parametrize("dataset", DEFAULT_SAMPLES)
def test_splits_are_independent(dataset):
    base = make_dataset(settings(dataset, spiral_noise=0.5), seed=7)
    changed = make_dataset(settings(dataset, spiral_noise=0.5, train_samples=37), seed=7)
    for name in ("val", "test"):
        for field in ("inputs", "labels", "clean_labels"):
            np.testing.assert_array_equal(
                getattr(getattr(base, name), field), getattr(getattr(changed, name), field)
            )
    size = min(len(base.train.inputs), len(base.val.inputs))
    assert not np.array_equal(base.train.inputs[:size], base.val.inputs[:size])
    # Nor does the noise change the inputs.
    quiet = make_dataset(settings(dataset, 0.0, spiral_noise=0.5), seed=7)
    np.testing.assert_array_equal(base.train.inputs, quiet.train.inputs)
    np.testing.assert_array_equal(base.train.clean_labels, quiet.train.labels)


def test_flipped_labels_are_drawn_evenly():
    generator = np.random.default_rng(0)
    labels = np.zeros(20, dtype=np.int64)
    counts = sum(flip_labels(labels, 0.25, generator) for _ in range(4000))
    np.testing.assert_allclose(counts / 4000, 0.25, atol=0.04)
    assert not labels.any()


@pytest.mark.parametrize("label_noise", [0.0, 0.1])
def test_bayes_accuracy_of_gaussian_is_that_of_its_posterior(label_noise):
    wanted = settings("gaussian", label_noise, test_samples=400_000)
    split = make_dataset(wanted, seed=11).test
    # log p(x|1) / p(x|0) = |x - (1, ..., 1)|^2 / 2 - |x|^2 / 2
    x = split.inputs.astype(float)
    best = ((x - 1) ** 2).sum(axis=1) > (x**2).sum(axis=1)
    assert (best == split.labels).mean() == pytest.approx(bayes_accuracy(wanted), abs=0.002)


def test_bayes_accuracy_is_the_known_number():
    assert bayes_accuracy(settings("gaussian", 0.0)) == pytest.approx(0.943, abs=5e-4)
    noisy = 0.9 * 0.9431 + 0.1 * 0.0569
    assert bayes_accuracy(settings("gaussian")) == pytest.approx(noisy, abs=1e-4)
    assert bayes_accuracy(settings("spiral")) == bayes_accuracy(settings("sinusoid")) == 0.9
    assert np.isnan(bayes_accuracy(settings("spiral", spiral_noise=1.0)))


@pytest.mark.parametrize("dataset", ["sinusoid2d", "spiral"])
def test_the_true_boundary_parts_the_clean_labels(dataset):
    split = make_dataset(settings(dataset), seed=5).test
    score = true_boundary(dataset, split.inputs.astype(float))
    clear = abs(score) > 1e-5
    np.testing.assert_array_equal(score[clear] > 0, split.clean_labels[clear] == 1)
    if dataset == "spiral":  # midway between the arms: as far from both as can be
        np.testing.assert_allclose(abs(score), 1, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"dataset": "moons"}, "dataset"),
        ({"label_noise": 1.0}, "label_noise"),
        ({"label_noise": -0.1}, "label_noise"),
        ({"label_noise": float("nan")}, "label_noise"),
        ({"spiral_noise": -1.0}, "spiral_noise"),
        ({"train_samples": 0}, "train_samples"),
        ({"test_samples": -3}, "test_samples"),
    ],
)
def test_bad_settings_name_the_setting_and_the_value(changes, name):
    with pytest.raises(SettingError, match=f"^{name} .*{next(iter(changes.values()))}"):
        DataSettings(**{"dataset": "spiral", "label_noise": 0.1, **changes})
