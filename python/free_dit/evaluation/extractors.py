"""Feature networks. The name of a metric ends in its network's: only metrics of one network can be compared."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from free_dit.evaluation.digits_classifier import CLASSIFIER, digits_classifier
from free_dit.evaluation.sets import WHERE, ImageSet
from free_dit.files import read_arrays, sha256_of, write_arrays
from free_kernels.validation import check_choice, fail

EXTRACTORS = ("digits_classifier", "inception_v3")
# Images of a cached piece of features; an interrupt loses at most one piece.
PIECE = 500


@dataclass(frozen=True)
class Extractor:
    """A frozen network.

    Attributes:
        name: the last part of the names of its metrics.
        sha256: of its weights.
        call: maps uint8 ``[B, H, W, C]`` to float32 features ``[B, D]`` and logits ``[B, K]``.
        reads_labels: whether logit c is that of label c, so that class accuracy means something.
        batch: images of a call.
    """

    name: str
    sha256: str
    call: Callable[[np.ndarray], tuple[Tensor, Tensor]]
    reads_labels: bool
    batch: int


@dataclass(frozen=True)
class Features:
    """The outputs of an extractor for a set.

    Attributes:
        features: float32 ``[N, D]``.
        logits: float32 ``[N, K]``.
        labels: int64 ``[N]``, or None.
    """

    features: np.ndarray
    logits: np.ndarray
    labels: np.ndarray | None


def digits_extractor() -> Extractor:
    """The bundled classifier of 8 x 8 digits: 16 features, 10 classes; on the CPU, where it is fast."""
    classifier = digits_classifier()

    @torch.no_grad()
    def call(pixels: np.ndarray) -> tuple[Tensor, Tensor]:
        if pixels.shape[1:] != (8, 8, 1):
            fail(WHERE, "images", "uint8 [N, 8, 8, 1] for the digits classifier", str(list(pixels.shape)))
        features = classifier.features(torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1)
        return features, classifier.classes(torch.nn.functional.silu(features))

    return Extractor("digits_classifier", sha256_of(CLASSIFIER), call, reads_labels=True, batch=500)


def _checked_weights(weights: Path | None, sha256: str | None) -> tuple[Path, str]:
    if weights is None:
        fail(WHERE, "weights", "torch-fidelity's Inception weights, a local file (--weights)", "None")
    if not weights.is_file():
        raise FileNotFoundError(f"{WHERE}: weights must be an existing file, got {weights}")
    named = re.search(r"-([0-9a-f]{8,64})\.pth$", weights.name)
    expected = sha256 or (named[1] if named else None)
    if expected is None:
        fail(WHERE, "weights", "named by its hash (...-6726825d.pth), or with --weights-sha256", weights.name)
    if not re.fullmatch("[0-9a-f]{8,64}", expected):
        fail(WHERE, "weights_sha256", "8 to 64 hexadecimal digits", expected)
    found = sha256_of(weights)
    if not found.startswith(expected):
        fail(WHERE, str(weights), f"of SHA-256 {expected}...", found)
    return weights, found


def inception_extractor(
    weights: Path | None, sha256: str | None = None, device: torch.device | str = "cpu", batch: int = 50
) -> Extractor:
    """torch-fidelity's port of the TensorFlow Inception of 2015: 2048 features, unbiased logits; nothing is downloaded.

    Args:
        weights: ``weights-inception-2015-12-05-6726825d.pth`` of torch-fidelity's releases.
        sha256: its hash or the first 8 or more digits of it; taken from the file's name if None.
        device: where to run it.
        batch: images of a call.

    Raises:
        ValueError: torch-fidelity does not import; the hash is wrong or unknown; the file is no plain state dict.
        FileNotFoundError: no such file.
    """
    weights, found = _checked_weights(weights, sha256)
    try:
        from torch_fidelity import FeatureExtractorInceptionV3
    # A torchvision built for another torch raises RuntimeError on import.
    except (ImportError, RuntimeError, AttributeError) as error:
        raise ValueError(
            f"{WHERE}: extractor 'inception_v3' must find torch-fidelity and a torchvision made for this torch "
            f"(pip install 'free-kernels[evaluation]'), got {type(error).__name__}: {error}"
        ) from error
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling errors are of many kinds
        raise ValueError(f"{WHERE}: {weights} must be a plain state dict, got {error}") from error
    # torch-fidelity unpickles the file that it reads: it gets a file written here from plain tensors.
    with tempfile.TemporaryDirectory() as folder:
        clean = Path(folder, "weights.pth")
        torch.save(state, clean)
        network = FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(clean)
        )
    network = network.to(device).eval()

    @torch.no_grad()
    def call(pixels: np.ndarray) -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).to(device)
        return network(images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images)

    return Extractor("inception_v3", found, call, reads_labels=False, batch=batch)


def load_extractor(
    name: str, weights: Path | None = None, sha256: str | None = None, device: torch.device | str = "cpu"
) -> Extractor:
    """``"digits_classifier"`` or ``"inception_v3"``.

    Raises:
        ValueError, FileNotFoundError: as the extractor's own.
    """
    check_choice(WHERE, "extractor", name, EXTRACTORS)
    return digits_extractor() if name == "digits_classifier" else inception_extractor(weights, sha256, device)


def extract(images: ImageSet, extractor: Extractor, cache: Path | None = None, progress: bool = False) -> Features:
    """Features of a whole set, in pieces that are kept on disk as they are done.

    A piece is found again by the hash of its pixels and of the network's weights, so it can be neither stale nor of
    another set, and an interrupted evaluation goes on where it stopped.

    Args:
        images: the set.
        extractor: the network.
        cache: folder of the pieces; None keeps none.
        progress: show a bar.

    Raises:
        FloatingPointError: a feature is not finite.
        ValueError: the images do not fit the network.
    """
    parts: list[dict[str, np.ndarray]] = []
    with tqdm(total=images.count, desc=images.source, unit="image", disable=not progress) as bar:
        for pixels in images.batches(PIECE):
            key = hashlib.sha256(f"{extractor.name} {extractor.sha256} {pixels.shape}".encode())
            key.update(np.ascontiguousarray(pixels))
            path = None if cache is None else Path(cache) / extractor.name / f"{key.hexdigest()[:40]}.npz"
            piece = read_arrays(path) if path is not None and path.is_file() else None
            if piece is None or any(len(piece.get(name, ())) != len(pixels) for name in ("features", "logits")):
                outputs = [
                    extractor.call(pixels[begin : begin + extractor.batch])
                    for begin in range(0, len(pixels), extractor.batch)
                ]
                both = [torch.cat(one).float().cpu().numpy() for one in zip(*outputs, strict=True)]
                piece = dict(zip(("features", "logits"), both, strict=True))
                if not all(np.isfinite(one).all() for one in both):
                    raise FloatingPointError(f"{WHERE}: features of {images.source} must be finite")
                if path is not None:
                    write_arrays(path, piece)
            parts.append(piece)
            bar.update(len(pixels))
    return Features(*(np.concatenate([part[name] for part in parts]) for name in ("features", "logits")), images.labels)
