"""Figures do not depend on the order of a set's files; tests of other labels; the FID as it is published."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from free_dit.evaluation import ArraySet, EvaluationSettings, Statistics, evaluate, load_extractor, open_images, render
from free_dit.evaluation.extractors import Extractor

QUICK = EvaluationSettings(resamples=4, permutations=40, subsets=2)
END = "_digits_classifier"


@pytest.fixture(scope="module")
def digits():
    images = open_images("digits-test")
    return np.concatenate(list(images.batches(500))), images.labels


def report_of(sets, reference, settings=QUICK):
    report = evaluate(sets, reference, load_extractor("digits_classifier"), settings)
    json.dumps(report, allow_nan=False)
    return report


def metrics_of(pixels, labels, reference, settings=QUICK):
    return report_of({"set": ArraySet("set", pixels, labels)}, reference, settings)["sets"]["set"]["metrics"]


def test_a_set_sorted_by_class_has_the_score_of_a_shuffled_one(digits):
    """In order, the ten parts of ten class folders are of one class each: a score near 1."""
    pixels, labels = digits
    reference, by_class = ArraySet("r", pixels, labels), np.argsort(labels, kind="stable")
    shuffled = np.random.default_rng(1).permutation(len(labels))
    found = {
        name: metrics_of(pixels[rows], labels[rows], reference)[f"score{END}"]
        for name, rows in {"sorted": by_class, "shuffled": shuffled}.items()
    }
    low, high = found["sorted"]["split_mean_range"]
    assert low <= found["sorted"]["split_mean"] <= high
    # Each is one of the orders that the other's range is of: they overlap, and are far from one class a part.
    assert low <= found["shuffled"]["split_mean_range"][1]
    assert high >= found["shuffled"]["split_mean_range"][0]
    assert low > 5
    assert found["sorted"]["split_permutations"] == 10
    assert found["sorted"]["split_seed"] == 0
    # The negative control: parts in order.
    extractor = load_extractor("digits_classifier")
    logits = extractor.call(pixels[by_class])[1].double()
    parts = [torch.log_softmax(part, 1) for part in logits.tensor_split(10)]
    scores = [float((p.exp() * (p - p.exp().mean(0).log())).sum(1).mean().exp()) for p in parts]
    assert np.mean(scores) < 1.5


def test_the_score_over_parts_is_shown_as_a_range(digits):
    pixels, labels = digits
    report = report_of({"set": ArraySet("set", pixels, labels)}, ArraySet("r", pixels, labels))
    found = report["sets"]["set"]["metrics"][f"score{END}"]
    low, high = found["split_mean_range"]
    assert f"over 10 permutations of the images (seed 0) the mean is {low:.4g} to {high:.4g}" in render(report)


def test_costly_metrics_take_rows_of_all_classes(digits):
    """With fewer rows than images those are drawn at random: the first ones of a sorted set are of a few classes."""
    pixels, labels = digits
    reference, by_class = ArraySet("r", pixels, labels), np.argsort(labels, kind="stable")
    settings = EvaluationSettings(resamples=4, permutations=40, subsets=2, rows=100, test_rows=60)
    found = metrics_of(pixels[by_class], labels[by_class], reference, settings)
    # The first 100 rows are three of ten classes, whose manifold holds less than half of the reference.
    assert found[f"recall{END}"]["value"] > 0.5
    assert found[f"recall{END}"]["rows"] == 100
    kernel = found[f"kernel_distance{END}"]
    assert kernel["two_sample_test"]["rows"] == [60, 60]
    # Equal laws: 3 standard errors are exceeded once in 400 runs, and this one is of a fixed seed.
    assert abs(kernel["value"]) < 3 * kernel["se"]
    first = metrics_of(pixels[by_class][:100], labels[by_class][:100], reference, settings)
    assert first[f"recall{END}"]["value"] < 0.5
    assert first[f"kernel_distance{END}"]["value"] > 3 * first[f"kernel_distance{END}"]["se"]


@pytest.mark.parametrize("moved", [10, 5, 0], ids=["no label in common", "half in common", "the same"])
def test_labels_that_the_reference_lacks_do_not_hide_noise(digits, moved):
    pixels, labels = digits
    noise = np.random.default_rng(3).integers(0, 256, pixels.shape).astype(np.uint8)
    given, reference = labels + moved, ArraySet("r", pixels, labels)
    report = report_of({"noise": ArraySet("noise", noise, given), "real": ArraySet("real", pixels, given)}, reference)
    tests = {name: one["metrics"][f"kernel_distance{END}"]["two_sample_test"] for name, one in report["sets"].items()}
    assert tests["noise"]["p_value"] == pytest.approx(1 / 41)
    assert tests["real"]["p_value"] > 0.9
    assert tests["noise"]["within_classes"] == (moved == 0)
    text = render(report)
    if moved:
        lacking = {10: 20, 5: 10}[moved]
        reason = f"{lacking} labels are in one set only, such as {0} in the second"
        assert tests["noise"]["over_all_because"] == reason
        assert f"`noise`: the p-value is over all images, not within classes: {reason}." in text
    else:
        assert tests["noise"]["over_all_because"] is None
        assert "over all images, not within" not in text


def test_one_set_without_labels(digits):
    pixels, labels = digits
    report = report_of({"set": ArraySet("set", pixels)}, ArraySet("r", pixels, labels))
    test = report["sets"]["set"]["metrics"][f"kernel_distance{END}"]["two_sample_test"]
    assert test["over_all_because"] == "only one set has labels"


def inception(pixels):
    """What stands for the network: 12 features and 3 logits of each image."""
    flat = torch.from_numpy(pixels.copy()).flatten(1).float() / 255
    return flat[:, :12], flat[:, :3]


def test_fid_is_the_field_s_formula():
    generator = np.random.default_rng(5)
    real, drawn = (generator.integers(0, top, (300, 4, 4, 1)).astype(np.uint8) for top in (256, 200))
    network = Extractor("inception_v3", "x", inception, reads_labels=False, batch=64)
    a, b = (inception(one)[0].numpy().astype(np.float64) for one in (drawn, real))
    covariances = [np.cov(one, rowvar=False) for one in (a, b)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    report = evaluate({"drawn": ArraySet("d", drawn)}, ArraySet("r", real), network, QUICK)
    found = report["sets"]["drawn"]["metrics"]
    # Two ways to the same root, of matrices of condition below 100: some hundred spacings of float64.
    assert found["fid_inception_v3"]["value"] == pytest.approx(expected, rel=1e-10)
    assert found["fid_inception_v3"] == {"value": expected, "images": 300, "reference_images": 300} | {
        "value": found["fid_inception_v3"]["value"]
    }
    assert found["frechet_inception_v3"]["value"] != found["fid_inception_v3"]["value"]
    assert f"`drawn`: FID {expected:.4f}, of all 300 images, with its bias." in render(report)
    statistics = Statistics("s", b.mean(0), covariances[1])
    again = evaluate({"drawn": ArraySet("d", drawn)}, statistics, network, QUICK)
    assert again["sets"]["drawn"]["metrics"]["fid_inception_v3"]["value"] == pytest.approx(expected, rel=1e-10)


def test_fid_is_torch_fidelity_s_where_it_is_installed():
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    generator = np.random.default_rng(6)
    a, b = generator.normal(size=(200, 12)), 1.2 * generator.normal(size=(300, 12))
    from free_dit.evaluation.frechet import frechet_distance

    statistics = [fid.fid_features_to_statistics(torch.from_numpy(one)) for one in (a, b)]
    theirs = fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-6)
