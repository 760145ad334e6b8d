"""The data sets against their formulas, independently written."""

import itertools

import numpy as np
import pytest

from datasets import DATASETS, Data, Dataset, Split, best_possible_accuracy, make_dataset
from settings import FIGURES_VERSION, SPLITS

SIZES = dict.fromkeys(("gaussian", "spiral"), (200, 200, 20_000))  # 100, 100, 10 000 per class
SIZES |= dict.fromkeys(("sinusoid", "sinusoid2d"), (100, 100, 20_000))


def draw(dataset: str, label_noise: float = 0.1, seed: int = 3, **changes: float) -> Dataset:
    if dataset != "spiral":
        changes.pop("spiral_noise", None)
    return make_dataset(Data(dataset=dataset, label_noise=label_noise, **changes), seed)


def flips(split: Split) -> list[int]:
    return list(np.flatnonzero(split.noisy_labels != split.clean_labels))


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("label_noise", [0.0, 0.01, 0.1, 0.57])
def test_shapes_types_balance_and_exact_count_of_flipped_labels(dataset, label_noise):
    data = draw(dataset, label_noise, seed=1)
    dimensions = 10 if dataset in ("gaussian", "sinusoid") else 2
    for name, samples in zip(SPLITS, SIZES[dataset]):
        split = getattr(data, name)
        assert split.inputs.shape == (samples, dimensions) and split.inputs.dtype == np.float32
        assert split.noisy_labels.shape == split.clean_labels.shape == (samples,)
        assert split.noisy_labels.dtype == split.clean_labels.dtype == np.int64
        flipped = flips(split)
        assert set(split.noisy_labels) == {0, 1} and len(flipped) == int(label_noise * samples)
        if label_noise:  # drawn evenly: the gaussian's and the spiral's labels stand by class
            assert abs(np.mean(flipped) / samples - 0.5) <= 1.3 / np.sqrt(len(flipped))
        spread = 0 if dataset in ("gaussian", "spiral") else 2.5 / np.sqrt(samples)
        assert abs(split.clean_labels.mean() - 0.5) <= spread


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
    first = {
        "sinusoid2d": [1.5389, 0.1749],
        "sinusoid": [1.5718, -1.8399],
        "gaussian": [0.7859, -0.92],
        "spiral": [0.393, -0.46],
    }
    for dataset, expected in first.items():
        inputs = draw(dataset, seed=0, spiral_noise=0.5).train.inputs
        np.testing.assert_allclose(inputs[0, :2], expected, atol=1e-4)


def assert_labels_are_signs(split: Split, score: np.ndarray) -> None:
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


def test_sinusoid_and_gaussian():
    split = draw("sinusoid").test
    inputs = split.inputs.astype(float)
    assert_labels_are_signs(split, inputs[:, 0] + np.sin(inputs[:, 1]))
    samples = [(inputs, 0, 2)]
    split = draw("gaussian").test
    samples += [(split.inputs[split.clean_labels == k], 1 - k, 1) for k in (0, 1)]
    for inputs, mean, deviation in samples:
        np.testing.assert_allclose(inputs.mean(axis=0), mean, atol=0.04 * deviation)
        covariance = np.cov(inputs.T) / deviation**2
        np.testing.assert_allclose(covariance, np.eye(10), atol=0.06)


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


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_split_has_streams_of_its_own(dataset):
    """The flips do not come from the stream of the inputs, of which other data sets take more."""
    equal = {"spiral_noise": 0.5, **{f"{name}_samples": 200 for name in SPLITS}}
    draws = [draw(dataset, seed=seed, **equal) for seed in (7, 8)]
    splits = [getattr(data, name) for data in draws for name in SPLITS]
    for one, other in itertools.combinations(splits, 2):
        assert np.isin(one.inputs, other.inputs).mean() < 0.01
        assert flips(one) != flips(other)
    for other in DATASETS:
        others = draw(other, seed=7, **equal)
        assert [flips(getattr(others, name)) for name in SPLITS] == [*map(flips, splits[:3])]
    # The same seed draws the same, whatever else changes.
    fewer = draw(dataset, seed=7, **{**equal, "train_samples": 37})
    quiet = draw(dataset, label_noise=0.0, seed=7, **equal)
    for name, split in zip(SPLITS, splits):
        if name != "train":
            np.testing.assert_equal(vars(getattr(fewer, name)), vars(split))
        without_flips = {**vars(split), "noisy_labels": split.clean_labels}
        np.testing.assert_equal(vars(getattr(quiet, name)), without_flips)


def test_best_possible_accuracy():
    def best(dataset: str, label_noise: float = 0.1, **changes: float) -> float:
        data = Data(dataset=dataset, label_noise=label_noise, **changes)
        return best_possible_accuracy(data, label_noise)

    split = draw("gaussian", seed=11, test_samples=400_000).test
    # log p(x|1) / p(x|0) = |x - (1, ..., 1)|^2 / 2 - |x|^2 / 2
    x = split.inputs.astype(float)
    bayes = ((x - 1) ** 2).sum(axis=1) > (x**2).sum(axis=1)
    assert (bayes == split.noisy_labels).mean() == pytest.approx(best("gaussian"), abs=0.002)
    assert (bayes == split.clean_labels).mean() == pytest.approx(best("gaussian", 0.0), abs=0.002)
    assert best("spiral") == best("sinusoid") == best("sinusoid2d") == 0.9
    assert best("sinusoid", test_samples=15) == pytest.approx(14 / 15)  # one is flipped
    assert np.isnan(best("spiral", spiral_noise=1.0))
