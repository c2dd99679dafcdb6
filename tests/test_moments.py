import numpy as np
import pytest
import torch

from depthutil import moments


@pytest.fixture
def corpus():
    """A number for each token of 40 documents of different lengths, alike inside each."""
    random = np.random.default_rng(0)
    sizes = random.integers(5, 400, 40)
    document = np.repeat(np.arange(40), sizes)
    return document, random.normal(1.5, 0.2, 40)[document] + random.normal(0, 1, len(document))


def test_the_standard_error_is_that_of_drawing_documents(corpus):
    document, values = corpus
    totals, counts = np.bincount(document, weights=values), np.bincount(document)
    mean, stderr = moments.of_totals(totals, counts)
    draws = np.random.default_rng(1).integers(40, size=(4_000, 40))
    means = totals[draws].sum(1) / counts[draws].sum(1)
    assert mean == pytest.approx(values.mean())
    assert stderr == pytest.approx(means.std(), rel=0.1)
    # The spread of tokens, as if they were independent, is another number altogether.
    assert stderr > 2 * values.std() / np.sqrt(len(values))


def test_the_three_ways_are_one_estimator(corpus):
    document, values = corpus
    values[::17] = np.nan
    mean, stderr = moments.over_documents(values, 3 * document + 1)
    running, start = moments.Moments(1, joint=True), 0
    running.shift = np.array([1.25])
    while start < len(values):
        stop = np.searchsorted(document, document[start] + 7)  # seven documents a batch
        rows = torch.arange(document[start], document[start] + 7)[:, None]
        inside = (torch.from_numpy(document[start:stop]) == rows).double()
        batch = torch.from_numpy(values[start:stop, None]) - 1.25
        running.add(*(total.numpy() for total in moments.tally(batch, inside)))
        start = stop
    assert running.mean()[0] == pytest.approx(mean, rel=1e-12)
    assert running.stderr()[0] == pytest.approx(stderr, rel=1e-12)
    assert running.stderr_of_average(np.array([0])) == pytest.approx(stderr, rel=1e-12)
    assert running.std()[0] == pytest.approx(np.nanstd(values, ddof=1), rel=1e-12)


def test_documents_that_count_nothing_are_passed_over():
    assert moments.of_totals([2.0, 0.0, 6.0], [2, 0, 2]) == (2.0, 1.0)
    mean, stderr = moments.of_totals([6.0], [3])
    assert mean == 2.0 and np.isnan(stderr)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: moments.of_totals([1.0], [1, 2]), "one entry a document"),
        (lambda: moments.of_totals([1.0, 1.0], [2, -1]), "not negative"),
        (lambda: moments.of_totals([0.0], [0]), "one at least is positive"),
        (lambda: moments.over_documents([1.0, 2.0], [0]), "one entry a token"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
