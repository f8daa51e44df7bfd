"""Real data and a real model: scikit-learn's bundled scans of handwritten digits, a forest that reads them, traffic.

The traffic is peaked, as traffic mostly is: a few images are asked for again and again (Zipf), most hardly ever, and
some have never been seen before. Everything is drawn from fixed seeds.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pandas as pd

Images = npt.NDArray[np.float32]
"""One flattened image of 8 x 8 pixels, each from 0 to 16, per row."""

SIDE: Final = 8
_INK: Final = 16
_HELD_OUT: Final = 0.25
_ZIPF_EXPONENT: Final = 1.1
_NEW: Final = 0.05
_SEED: Final = 20


@dataclass(frozen=True, slots=True)
class Trained:
    """A fitted pipeline, the columns it takes, and what it was not fitted on."""

    pipeline: Any
    held_out: pd.DataFrame
    fitted_on: int
    accuracy: float
    """On the held-out scans."""

    def predict(self, images: Images) -> list[list[list[Any]]]:
        """What scikit-learn itself says of each image: the digit, and the probability of all ten."""
        import pandas as pd

        rows = pd.DataFrame(images, columns=self.held_out.columns)
        labels = self.pipeline.predict(rows).tolist()
        probabilities = self.pipeline.predict_proba(rows).tolist()
        return [[[label], probability] for label, probability in zip(labels, probabilities, strict=True)]


def train(trees: int) -> Trained:
    """Fit a StandardScaler and a RandomForest to three quarters of the scans."""
    from sklearn.datasets import load_digits
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    digits = load_digits(as_frame=True)
    scans = digits.data.astype("float32")
    x, held_out, y, answers = train_test_split(
        scans, digits.target, test_size=_HELD_OUT, random_state=_SEED, stratify=digits.target
    )
    pipeline = make_pipeline(StandardScaler(), RandomForestClassifier(trees, random_state=_SEED, n_jobs=-1))
    pipeline.fit(x, y)
    # One thread predicts a row no slower, and does not warn.
    pipeline.set_params(randomforestclassifier__n_jobs=1)
    return Trained(pipeline, held_out, len(x), float(pipeline.score(held_out, answers)))


@dataclass(frozen=True, slots=True)
class Traffic:
    """Images, how often each was asked for so far, and the requests that come now."""

    images: Images
    asked_before: npt.NDArray[np.int64]
    """Requests for each image in the traffic so far; 0 for those that nobody knows yet."""
    requests: tuple[int, ...]
    """Numbers of images, one per request."""

    def popular(self, count: int) -> npt.NDArray[np.int64]:
        """Numbers of the images that were asked for most so far, at most ``count``."""
        order = np.argsort(-self.asked_before, kind="stable")[:count]
        return order[self.asked_before[order] > 0]


def traffic(scans: Images, past: int, requests: int) -> Traffic:
    """Peaked traffic over scans: ``past`` requests that were, ``requests`` that come.

    Each scan is there as it is and moved by a pixel in all directions, as if it had been scanned again. The rank of
    an image is drawn by lot; it is asked for in proportion to rank ** -1.1. Of the requests that come, one in
    twenty is for an image that has never been there: a scan with other noise.
    """
    random = np.random.default_rng(_SEED)
    known = np.unique(np.concatenate([_moved(scans, x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)]), axis=0)
    random.shuffle(known)
    popularity = np.arange(1, len(known) + 1) ** -_ZIPF_EXPONENT
    popularity /= popularity.sum()
    before = Counter(random.choice(len(known), past, p=popularity).tolist())
    order = random.choice(len(known), requests, p=popularity)
    strangers = np.flatnonzero(random.random(requests) < _NEW)
    noise = random.integers(-1, 2, (len(strangers), SIDE * SIDE))
    new = np.clip(scans[random.integers(0, len(scans), len(strangers))] + noise, 0, _INK).astype(np.float32)
    order[strangers] = len(known) + np.arange(len(strangers))
    images = np.concatenate([known, new])
    asked = np.array([before[i] for i in range(len(images))])
    return Traffic(images, asked, tuple(order.tolist()))


def _moved(scans: Images, x: int, y: int) -> Images:
    """The scans moved right by ``x`` and down by ``y`` pixels; what comes in at the edge is blank."""
    padded = np.pad(scans.reshape(-1, SIDE, SIDE), ((0, 0), (1, 1), (1, 1)))
    moved = padded[:, 1 - y : 1 - y + SIDE, 1 - x : 1 - x + SIDE]
    return np.ascontiguousarray(moved).reshape(-1, SIDE * SIDE)


def drawn(image: Images) -> str:
    """An image in characters, two per pixel."""
    shades = " .:-=+*%#@"
    pixels = np.asarray(image).reshape(SIDE, SIDE)
    return "\n".join(
        "".join(2 * shades[round(float(ink) / _INK * (len(shades) - 1))] for ink in row) for row in pixels
    )
