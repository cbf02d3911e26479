"""What evaluation reads: image sets as streams, features kept by content, weights that are checked before use."""

from __future__ import annotations

import hashlib
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from free_dit.evaluation import ArraySet, extract, extractors, load_extractor, open_images, open_reference


class Counted:
    """An extractor that counts its calls and is interrupted at one of them."""

    def __init__(self, stop_at: int = -1, sha256: str = "a") -> None:
        self.calls, self.stop_at = 0, stop_at
        self.extractor = extractors.Extractor("counted", sha256, self.call, reads_labels=False, batch=4)

    def call(self, pixels):
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.calls += 1
        flat = torch.from_numpy(pixels.copy()).flatten(1).float()
        return flat[:, :5], flat[:, 5:8]


def test_finished_features_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(extractors, "PIECE", 8)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3, 3, 1)).astype(np.uint8)
    images, whole = ArraySet("x", pixels), Counted()
    expected = extract(images, whole.extractor)
    assert whole.calls == 5
    broken = Counted(stop_at=3)  # in the second piece
    with pytest.raises(KeyboardInterrupt):
        extract(images, broken.extractor, tmp_path)
    resumed = Counted()
    found = extract(images, resumed.extractor, tmp_path)
    assert resumed.calls == 3
    np.testing.assert_array_equal(found.features, expected.features)
    np.testing.assert_array_equal(found.logits, expected.logits)
    # A damaged piece is made again, and so is every piece for other weights or of other pixels.
    next((tmp_path / "counted").iterdir()).write_bytes(b"PK")
    again = Counted()
    np.testing.assert_array_equal(extract(images, again.extractor, tmp_path).features, expected.features)
    assert again.calls in (1, 2)
    other = Counted(sha256="b")
    extract(images, other.extractor, tmp_path)
    assert other.calls == 5
    changed = pixels.copy()
    changed[0, 0, 0, 0] ^= 1
    third = Counted()
    assert extract(ArraySet("x", changed), third.extractor, tmp_path).features[0, 0] == changed[0, 0, 0, 0]
    assert third.calls == 2


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_files_are_read_as_streams(tmp_path, save):
    generator = np.random.default_rng(1)
    pixels, labels = generator.integers(0, 256, (11, 4, 5, 3)).astype(np.uint8), np.arange(11)
    save(tmp_path / "a.npz", arr_0=pixels, arr_1=labels)
    images = open_images(tmp_path / "a.npz")
    assert images.count == 11
    assert images.labels.tolist() == labels.tolist()
    parts = list(images.batches(4))
    assert [len(part) for part in parts] == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate(parts), pixels)
    save(tmp_path / "b.npz", arr_0=pixels)
    assert open_images(tmp_path / "b.npz").labels is None


def test_folders_of_png(tmp_path):
    generator = np.random.default_rng(2)
    pixels = generator.integers(0, 256, (4, 6, 6, 3)).astype(np.uint8)
    for i, place in enumerate(("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png")):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels[i]).save(tmp_path / place)
    images = open_images(tmp_path)
    assert images.labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(np.concatenate(list(images.batches(3))), pixels)
    (tmp_path / "labels.txt").write_text("5\n5\n7\n7\n")
    assert open_images(tmp_path).labels.tolist() == [5, 5, 7, 7]
    grey = tmp_path / "grey"
    grey.mkdir()
    Image.fromarray(pixels[0, ..., 0]).save(grey / "1.png")
    assert open_images(grey).labels is None
    assert next(open_images(grey).batches(9)).shape == (1, 6, 6, 1)


def broken_files(folder: Path) -> None:
    pixels = np.zeros((3, 8, 8, 1), np.uint8)
    np.savez(folder / "objects.npz", arr_0=np.array([{}], dtype=object))
    np.savez(folder / "labels.npz", arr_0=pixels, arr_1=np.array(["a", "b", "c"]))
    np.savez(folder / "float.npz", arr_0=pixels.astype(float))
    np.savez(folder / "fortran.npz", arr_0=np.asfortranarray(np.zeros((3, 8, 8, 3), np.uint8)))
    np.savez(folder / "other.npz", images=pixels)
    np.savez(folder / "statistics.npz", mu=np.zeros(3), sigma=np.eye(2))
    np.savez(folder / "whole.npz", arr_0=pixels)
    (folder / "cut.npz").write_bytes((folder / "whole.npz").read_bytes()[:-30])
    (folder / "empty").mkdir()
    (folder / "png").mkdir()
    (folder / "png" / "0.png").write_bytes(b"GIF89a")
    (folder / "text.txt").write_text("x")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("objects.npz", r"images uint8 \[N, H, W, 1 or 3\] with N >= 1, got object"),
        ("labels.npz", r"labels of integers at least 0, \[3\], got <U1"),
        ("float.npz", r"must be images uint8 .* got float64 \[3, 8, 8, 1\]"),
        ("fortran.npz", "must be images in C order, got Fortran order"),
        ("other.npz", "must be a whole .npz with arr_0 and no objects"),
        ("statistics.npz", r"must be finite mu \[D\] and symmetric sigma \[D, D\], got \(3,\) and \(2, 2\)"),
        ("cut.npz", "must be a whole .npz"),
        ("empty", "must be a folder of PNG or one with manifest.json"),
        ("png", "0.png must be a PNG"),
        ("text.txt", r"must be an .npz or a folder, got a file '\.txt'"),
    ],
)
def test_wrong_inputs_are_named(tmp_path, name, message):
    broken_files(tmp_path)
    with pytest.raises(ValueError, match=f"^evaluate: .*{message}"):
        list(open_reference(tmp_path / name).batches(2))
    with pytest.raises(FileNotFoundError, match="must be an .npz, a folder, or one of digits-train, digits-test"):
        open_images(tmp_path / "none")


class FakeInception(torch.nn.Module):
    """torch-fidelity's constructor and outputs, with a linear layer for the network."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None) -> None:
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        self.layer = torch.nn.Linear(12, 6)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, images):
        assert images.dtype == torch.uint8
        features = self.layer(images.flatten(1).float() / 255)
        return features, features[:, :3]


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (Path(self.path).touch, ())


def test_inception_weights_are_checked_and_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.SimpleNamespace(FeatureExtractorInceptionV3=FakeInception))
    torch.manual_seed(0)
    state = torch.nn.Linear(12, 6).state_dict()
    plain = tmp_path / "weights.pth"
    torch.save({f"layer.{name}": value for name, value in state.items()}, plain)
    digest = hashlib.sha256(plain.read_bytes()).hexdigest()
    named = plain.rename(tmp_path / f"weights-inception-2015-12-05-{digest[:8]}.pth")
    network = load_extractor("inception_v3", named)
    assert network.sha256 == digest
    assert not network.reads_labels
    pixels = np.random.default_rng(4).integers(0, 256, (9, 2, 2, 3)).astype(np.uint8)
    found = extract(ArraySet("x", pixels), network)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).flatten(1).float() / 255
    expected = torch.nn.functional.linear(images, state["weight"], state["bias"])
    np.testing.assert_allclose(found.features, expected.numpy(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="must be of SHA-256 00000000..., got " + digest):
        load_extractor("inception_v3", named, "00000000")
    unnamed = tmp_path / "weights.pth"
    unnamed.write_bytes(named.read_bytes())
    with pytest.raises(ValueError, match="weights must be named by its hash"):
        load_extractor("inception_v3", unnamed)
    load_extractor("inception_v3", unnamed, digest)
    with pytest.raises(FileNotFoundError, match="weights must be an existing file"):
        load_extractor("inception_v3", tmp_path / "none.pth")
    trap = tmp_path / "trap"
    unnamed.write_bytes(pickle.dumps(Payload(str(trap))))
    with pytest.raises(ValueError, match="must be a plain state dict"):
        load_extractor("inception_v3", unnamed, hashlib.sha256(unnamed.read_bytes()).hexdigest())
    assert not trap.exists()
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match=r"must find torch-fidelity .*free-kernels\[evaluation\]"):
        load_extractor("inception_v3", named)
