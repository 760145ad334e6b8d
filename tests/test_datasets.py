"""The data sets against their formulas, independently written."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from datasets import DATASETS, Data, best_possible_accuracy, flip_labels, make_dataset
from settings import FIGURES_VERSION, SPLITS, SettingError

SIZES = {
    "gaussian": (200, 200, 20_000),  # 100, 100 and 10 000 per class
    "spiral": (200, 200, 20_000),
    "sinusoid": (100, 100, 20_000),
    "sinusoid2d": (100, 100, 20_000),
}


def draw(dataset, label_noise=0.1, seed=3, **changes):
    return make_dataset(Data(dataset=dataset, label_noise=label_noise, **changes), seed)


def flips(split):
    return list(np.flatnonzero(split.noisy_labels != split.clean_labels))


@pytest.mark.parametrize("dataset", SIZES)
@pytest.mark.parametrize("label_noise", [0.0, 0.01, 0.1, 0.57])
def test_shapes_types_balance_and_exact_count_of_flipped_labels(dataset, label_noise):
    data = draw(dataset, label_noise, seed=1)
    dimensions = 10 if dataset in ("gaussian", "sinusoid") else 2
    for name, samples in zip(SPLITS, SIZES[dataset]):
        split = getattr(data, name)
        assert split.inputs.shape == (samples, dimensions) and split.inputs.dtype == np.float32
        assert split.noisy_labels.shape == split.clean_labels.shape == (samples,)
        assert split.noisy_labels.dtype == split.clean_labels.dtype == np.int64
        assert set(split.noisy_labels) == {0, 1} and len(flips(split)) == int(label_noise * samples)
        spread = 0 if dataset in ("gaussian", "spiral") else 2.5 / np.sqrt(samples)
        assert abs(split.clean_labels.mean() - 0.5) <= spread
    assert set(DATASETS) == set(SIZES)
    filled = Data(dataset=dataset, label_noise=label_noise, val_samples=7).filled()
    assert (filled.train_samples, filled.val_samples) == (SIZES[dataset][0], 7)


def test_the_data_are_those_of_the_figures():
    """What other data would change: then FIGURES_VERSION goes up, and these with it."""
    assert FIGURES_VERSION == 2
    flipped = {
        "sinusoid2d": ([16, 54, 65, 75, 94], [14, 37, 51, 71, 82], [12, 29, 64, 75, 86]),
        "spiral": ([12, 40, 69, 110, 147], [44, 92, 97, 112, 130], [12, 29, 64, 75, 86]),
    }
    for dataset, expected in flipped.items():
        data = draw(dataset, 0.05, seed=0)
        assert tuple(flips(getattr(data, name))[:5] for name in SPLITS) == expected
    first = draw("gaussian", seed=0).train.inputs[0, :3]
    np.testing.assert_allclose(first, [0.7859, -0.9200, 1.4716], atol=1e-4)


def assert_labels_are_signs(split, score):
    clear = abs(score) > 1e-5
    np.testing.assert_array_equal(split.clean_labels[clear], score[clear] > 0)


def test_sinusoid2d():
    split = draw("sinusoid2d").test
    inputs = split.inputs.astype(float)
    x1, x2 = inputs.T
    score = 1.5 * x1 + np.sin(1.5 * x2)
    assert_labels_are_signs(split, score)
    np.testing.assert_allclose(DATASETS["sinusoid2d"].boundary(inputs), score)
    # Uniform in the disc of radius 2: the squared radius is uniform on [0, 4], the angle too.
    radius, angle = np.hypot(x1, x2), np.arctan2(x2, x1)
    assert radius.max() <= 2
    for values, low, high in ((radius**2, 0, 4), (angle, -np.pi, np.pi)):
        share, _ = np.histogram(values, bins=10, range=(low, high))
        np.testing.assert_allclose(share / len(values), 0.1, atol=0.012)


def test_sinusoid():
    split = draw("sinusoid").test
    inputs = split.inputs.astype(float)
    assert_labels_are_signs(split, inputs[:, 0] + np.sin(inputs[:, 1]))
    np.testing.assert_allclose(inputs.mean(axis=0), 0, atol=0.08)
    np.testing.assert_allclose(np.cov(inputs.T), 4 * np.eye(10), atol=0.25)


def test_gaussian():
    split = draw("gaussian").test
    for label, mean in ((1, 0), (0, 1)):
        inputs = split.inputs[split.clean_labels == label]
        np.testing.assert_allclose(inputs.mean(axis=0), mean, atol=0.06)
        np.testing.assert_allclose(np.cov(inputs.T), np.eye(10), atol=0.08)


def test_spiral():
    split = draw("spiral", train_samples=9).train
    for label, size, start in ((1, 5, 0), (0, 4, np.pi)):
        inputs = split.inputs[split.clean_labels == label]
        assert len(inputs) == size
        for k, point in enumerate(inputs):
            angle = k * 4 * np.pi / (size - 1)
            radius = angle + start
            expected = radius * np.cos(angle), radius * np.sin(angle)
            np.testing.assert_allclose(point, expected, atol=1e-5)
    score = DATASETS["spiral"].boundary(split.inputs.astype(float))
    assert_labels_are_signs(split, score)
    np.testing.assert_allclose(abs(score), 1, atol=1e-4)  # midway between the arms
    noise = draw("spiral", spiral_noise=0.7).test.inputs - draw("spiral").test.inputs
    np.testing.assert_allclose(noise.std(axis=0), 0.7, rtol=0.03)
    np.testing.assert_allclose(noise.mean(axis=0), 0, atol=0.03)


@pytest.mark.parametrize("dataset", SIZES)
def test_every_split_has_streams_of_its_own(dataset):
    equal = {"spiral_noise": 0.5, **{f"{name}_samples": 200 for name in SPLITS}}
    draws = [draw(dataset, seed=seed, **equal) for seed in (7, 8)]
    splits = [getattr(data, name) for data in draws for name in SPLITS]
    for one, other in itertools.combinations(splits, 2):
        assert np.isin(one.inputs, other.inputs).mean() < 0.01
        assert flips(one) != flips(other)
    # The flips do not come from the stream of the inputs, of which other data sets take more.
    for other in SIZES:
        assert [flips(getattr(draw(other, seed=7, **equal), name)) for name in SPLITS] == [
            flips(split) for split in splits[:3]
        ]


@pytest.mark.parametrize("dataset", SIZES)
def test_same_seed_same_bits_whatever_else_changes(dataset):
    base = draw(dataset, spiral_noise=0.5)
    changed = draw(dataset, spiral_noise=0.5, train_samples=37)
    quiet = draw(dataset, 0.0, spiral_noise=0.5)
    for name, field in itertools.product(SPLITS, ("inputs", "noisy_labels", "clean_labels")):
        bits = getattr(getattr(base, name), field)
        if name != "train":
            np.testing.assert_array_equal(bits, getattr(getattr(changed, name), field))
        if field != "noisy_labels":
            np.testing.assert_array_equal(bits, getattr(getattr(quiet, name), field))


def test_flipped_labels_are_drawn_evenly():
    generator = np.random.default_rng(0)
    labels = np.zeros(20, dtype=np.int64)
    counts = sum(flip_labels(labels, 0.25, generator) for _ in range(4000))
    np.testing.assert_allclose(counts / 4000, 0.25, atol=0.04)
    assert not labels.any()


def test_best_accuracy_of_gaussian_is_that_of_its_posterior():
    wanted = Data(dataset="gaussian", label_noise=0.1, test_samples=400_000)
    split = make_dataset(wanted, seed=11).test
    # log p(x|1) / p(x|0) = |x - (1, ..., 1)|^2 / 2 - |x|^2 / 2
    x = split.inputs.astype(float)
    best = ((x - 1) ** 2).sum(axis=1) > (x**2).sum(axis=1)
    for labels, noise in ((split.noisy_labels, 0.1), (split.clean_labels, 0.0)):
        expected = best_possible_accuracy(wanted, noise)
        assert (best == labels).mean() == pytest.approx(expected, abs=0.002)


def test_best_accuracy_is_the_known_number():
    def best(dataset, label_noise=0.1, **changes):
        data = Data(dataset=dataset, label_noise=label_noise, **changes)
        return best_possible_accuracy(data, label_noise)

    assert best("gaussian", 0.0) == pytest.approx(0.943, abs=5e-4)
    assert best("spiral") == best("sinusoid") == best("sinusoid2d") == 0.9
    assert best("sinusoid", test_samples=15) == pytest.approx(14 / 15)  # one is flipped
    assert np.isnan(best("spiral", spiral_noise=1.0))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dataset", "moons"),
        *(("label_noise", value) for value in (1.0, -0.1, np.nan)),
        *(("spiral_noise", value) for value in (-1.0, np.inf)),
        *(("train_samples", 0), ("test_samples", -3)),
    ],
)
def test_bad_settings_name_the_setting_and_the_value(name, value):
    with pytest.raises(SettingError, match=f"^{name} .*{value}"):
        Data(**{"dataset": "spiral", "label_noise": 0.1, name: value})
