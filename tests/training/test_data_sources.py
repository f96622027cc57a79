"""Data sets other than folders: torchvision's by name, and tar shards."""

from __future__ import annotations

import gc
import struct
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from condconv_surgery.data.find_data import find_data, require_data
from condconv_surgery.data.labelled_images import LabelledImages, logit_of_each_class, with_classes_of
from condconv_surgery.data.torchvision_datasets import SETS, TorchvisionImages
from condconv_surgery.data.webdataset_shards import expand_braces, scan_shards
from condconv_surgery.errors import InputError
from condconv_surgery.recipe import TrainingOptions
from condconv_surgery.recipe.training_sections import DataOptions
from condconv_surgery.training import finetune
from tests.small_networks import small_net


def pixels(images: LabelledImages, index: int) -> np.ndarray:
    with images.open(index) as image:
        return np.asarray(image)


def options_for(tmp_path: Path, run: str, **data: object) -> TrainingOptions:
    return TrainingOptions().updated(
        {
            "output": str(tmp_path / run),
            "data": {"image_size": 16, "batch_size": 4, "workers": 0, **data},
            "schedule": {"epochs": 2},
        }
    )


def weights(options: TrainingOptions) -> dict[str, torch.Tensor]:
    return load_file(Path(options.output) / "last.safetensors")


def assert_same(one: TrainingOptions, other: TrainingOptions) -> None:
    assert [n for n, t in weights(one).items() if not torch.equal(t, weights(other)[n])] == []


def write_mnist(root: Path, each: int = 6) -> np.ndarray:
    """Files as MNIST has them: magic number, sizes, bytes."""
    raw = root / "MNIST/raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (3 * each, 28, 28)).astype("uint8")
    labels = (np.arange(3 * each) % 3).astype("uint8")
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, *images.shape) + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(labels)) + labels.tobytes())
    return images


def test_a_torchvision_set_by_name(tmp_path: Path) -> None:
    images = write_mnist(tmp_path)
    held_in, held_out = find_data(DataOptions(folder="torchvision:mnist", root=str(tmp_path)), 0)
    assert (len(held_in), len(held_out)) == (15, 3), "the test images do not select"
    train, val = find_data(DataOptions(folder="torchvision:mnist", root=str(tmp_path), val="test"), 0)
    assert (len(train), len(val)) == (18, 18)
    assert train.classes[:2] == val.classes[:2] == ("0 - zero", "1 - one")
    assert train.labels[:4] == (0, 1, 2, 0)
    assert np.array_equal(pixels(train, 5), images[5])
    assert train.name(5) == "MNIST[5]"


def write_qmnist(root: Path, each: int = 4) -> None:
    """Files as QMNIST has them: 8 integers for each image, of which the first is its class."""
    raw = root / "QMNIST/raw"
    raw.mkdir(parents=True)
    images = np.zeros((10 * each, 28, 28), dtype="uint8")
    labels = np.full((len(images), 8), 99, dtype=">i4")
    labels[:, 0] = np.arange(len(images)) % 10
    for part in ("train", "test"):
        head = struct.pack(">IIII", 2051, *images.shape)
        (raw / f"qmnist-{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        head = struct.pack(">III", 0xC02, *labels.shape)
        (raw / f"qmnist-{part}-labels-idx2-int").write_bytes(head + labels.tobytes())


def test_the_class_of_a_qmnist_image_is_the_first_of_its_labels(tmp_path: Path) -> None:
    write_qmnist(tmp_path)
    train, val = find_data(DataOptions(folder="torchvision:qmnist", root=str(tmp_path)), 0)
    assert (len(train), len(val)) == (30, 10)
    assert set(train.labels) == set(range(10)) == set(val.labels)
    assert len(train.classes) == 10


def test_a_torchvision_set_in_one_piece_is_split() -> None:
    train, val = find_data(DataOptions(folder="torchvision:FakeData", val_fraction=0.3), 0)
    assert len(train) + len(val) == 1000
    assert set(train.labels) == set(val.labels) == set(range(10))
    assert not {train.name(i) for i in range(len(train))} & {val.name(i) for i in range(len(val))}


def test_a_torchvision_set_with_other_images_to_validate_on_is_refused() -> None:
    with pytest.raises(InputError, match=r'data\.val="images" with data="torchvision:cifar10"(.|\n)*data\.val=""'):
        require_data(DataOptions(folder="torchvision:cifar10", val="images"))


def test_every_named_set_is_torchvisions() -> None:
    import inspect

    import torchvision

    for title, parts in SETS.values():
        taken = inspect.signature(getattr(torchvision.datasets, title)).parameters
        for part in parts:
            assert "kwargs" in taken or set(part) <= set(taken), title


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:cifar11", r"Unknown data set of torchvision 'cifar11'.\n.*cifar10"),
        ("torchvision:celeba", "has many labels per image"),
        ("torchvision:vocdetection", "has boxes"),
        ("torchvision:CIFAR", r"Unknown data set of torchvision 'cifar'.\n.*Nearest: cifar10, cifar100"),
        ("torchvision:cifar10", r"CIFAR10 can't be read(.|\n)*data.download=True"),
    ],
)
def test_torchvision_sets_that_are_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_data(DataOptions(folder=name, root=str(tmp_path)), 0)


def test_torchvision_files_that_are_damaged_or_cannot_be_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mnist(tmp_path)
    (tmp_path / "MNIST/raw/train-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 18) + b"\1\2")
    with pytest.raises(InputError, match=r"MNIST can't be read from (.|\n)*stored as torchvision downloads them"):
        find_data(DataOptions(folder="torchvision:mnist", root=str(tmp_path)), 0)

    def offline(*args: object, **how: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(InputError, match=r"no network\.(.|\n)*") as caught:
        find_data(DataOptions(folder="torchvision:cifar10", root=str(tmp_path), download=True), 0)
    assert "download" not in caught.value.fix  # it is what was tried


def test_classes_of_one_name_keep_their_numbers() -> None:
    """ImageNet has two kinds of crane."""
    names = ("crane", "dog", "crane")
    train, val = (TorchvisionImages("t", None, names, (0, 1, 2), (0, 1, 2)) for _ in range(2))
    assert with_classes_of(train, val, "val").labels == (0, 1, 2)
    logits = logit_of_each_class(names, names)
    assert logits is not None
    assert logits.tolist() == [0, 1, 2]


def write_shards(
    folder: Path, pattern: str = "s-%03d.tar", label: Callable[[int], dict[str, object]] | None = None
) -> Path:
    """Three shards with eight images each, written by webdataset itself."""
    webdataset = pytest.importorskip("webdataset")
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with webdataset.ShardWriter(str(folder / pattern), maxcount=8, verbose=0) as sink:
        for i in range(24):
            image = rng.integers(0, 100, (20, 20, 3)).astype("uint8")
            image[..., i % 3] += 120
            sink.write({"__key__": f"{i:05}", "png": image, **(label(i) if label else {"cls": i % 3})})
    return folder


def test_shards_hold_what_webdataset_reads(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    pattern = str(write_shards(tmp_path) / "s-{000..002}.tar")
    images = scan_shards(pattern)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files to the garbage collector
        theirs = list(webdataset.WebDataset(pattern, shardshuffle=False).decode("pil").to_tuple("png", "cls"))
        gc.collect()
    assert images.labels == tuple(label for _, label in theirs)
    assert images.classes == ("0", "1", "2")
    for index, (image, _) in enumerate(theirs):
        assert np.array_equal(pixels(images, index), np.asarray(image))
    assert scan_shards(str(tmp_path / "s-*.tar")) == images


@pytest.mark.parametrize(
    "pattern", ["a", "a-{0..3}.tar", "a-{08..11}.tar", "a-{998..1001}.tar", "{x,y}/s-{00..01}{p,q}.tar", "a-{3..3}"]
)
def test_braces_expand_as_in_webdataset(pattern: str) -> None:
    assert expand_braces(pattern) == list(pytest.importorskip("braceexpand").braceexpand(pattern))


def test_class_names_of_shards(tmp_path: Path) -> None:
    write_shards(tmp_path / "texts", label=lambda i: {"cls": ["cat", "ant", "bee"][i % 3]})
    assert scan_shards(str(tmp_path / "texts/s-*.tar")).classes == ("ant", "bee", "cat")
    write_shards(tmp_path / "named", label=lambda i: {"json": {"label": i % 3}})
    (tmp_path / "named/classes.txt").write_text("red\ngreen\nblue\n")
    named = scan_shards(str(tmp_path / "named/s-*.tar"))
    assert (named.classes, named.labels[:3]) == (("red", "green", "blue"), (0, 1, 2))
    (tmp_path / "named/classes.txt").write_text("red\n")
    with pytest.raises(InputError, match="has 1 names, but there is a label 2"):
        scan_shards(str(tmp_path / "named/s-*.tar"))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (lambda i: {"json": {"label": [0, 1]}}, "has many labels"),
        (lambda i: {"json": {"label": 0.5}}, "has the label 0.5"),
        (lambda i: {"json": {"class": 1}}, "has no label"),
        (lambda i: {"txt": "a caption"}, "has images and no labels"),
        (lambda i: {"cls": i if i % 2 else "odd"}, "Some labels are numbers and some are names"),
    ],
)
def test_shards_of_other_tasks_are_refused(
    tmp_path: Path, label: Callable[[int], dict[str, object]], message: str
) -> None:
    write_shards(tmp_path, label=label)
    with pytest.raises(InputError, match=message):
        scan_shards(str(tmp_path / "s-*.tar"))


def test_an_image_without_a_label_among_others_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, label=lambda i: {"txt": "a caption"} if i == 4 else {"cls": 0})
    with pytest.raises(InputError, match=r"has no label for 00004\.png"):
        scan_shards(str(tmp_path / "s-*.tar"))


def test_shards_that_are_not_there(tmp_path: Path) -> None:
    write_shards(tmp_path)
    for pattern, message in (
        ("s-{000..004}.tar", r"There is no .*s-003\.tar"),
        ("t-*.tar", "There is no"),
        ("s-000.tar.gz", "There is no"),
    ):
        with pytest.raises(InputError, match=message):
            require_data(DataOptions(folder=str(tmp_path / pattern)))
    with pytest.raises(InputError, match="not on this machine"):
        require_data(DataOptions(folder="https://somewhere/s-000.tar"))
    with tarfile.open(tmp_path / "z.tar.gz", "w:gz"):
        pass
    with pytest.raises(InputError, match=r"is compressed(.|\n)*gunzip"):
        require_data(DataOptions(folder=str(tmp_path / "z.tar.gz")))
    (tmp_path / "x.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(InputError, match="is not a complete tar file"):
        scan_shards(str(tmp_path / "x.tar"))


def test_a_run_over_shards_is_a_run_over_the_same_folder(tmp_path: Path) -> None:
    """The same images in the same order give the same weights, wherever they lie and whoever reads them."""
    sorted_by_class = lambda i: {"cls": i * 3 // 16 if i < 16 else (i - 16) * 3 // 8}  # noqa: E731
    shards = scan_shards(str(write_shards(tmp_path / "tar", label=sorted_by_class) / "s-*.tar"))
    for index in range(24):
        path = tmp_path / f"folder/{'train' if index < 16 else 'val'}/{shards.labels[index]}/{index:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(shards, index)).save(path)
    of_folder = options_for(tmp_path, "of-folder", folder=str(tmp_path / "folder"))
    finetune(small_net(), of_folder)
    for workers in (0, 2):
        places = {"folder": str(tmp_path / "tar/s-{000..001}.tar"), "val": str(tmp_path / "tar/s-002.tar")}
        of_shards = options_for(tmp_path, f"of-shards-{workers}", **places, workers=workers)
        result = finetune(small_net(), of_shards)
        assert (result.train_images, result.val_images, result.classes) == (16, 8, ("0", "1", "2"))
        assert_same(of_folder, of_shards)


def test_a_shard_cut_short_has_unreadable_images(tmp_path: Path) -> None:
    write_shards(tmp_path)
    last = tmp_path / "s-002.tar"
    with tarfile.open(last) as tar:
        offset = next(m.offset_data for m in tar if m.name == "00020.png")
    content = bytearray(last.read_bytes())
    content[offset : offset + 40] = bytes(40)
    last.write_bytes(content)
    options = options_for(tmp_path, "run", folder=str(tmp_path / "s-*.tar"))
    with pytest.raises(InputError, match=r"unreadable image.*s-002\.tar/00020\.png"):
        finetune(small_net(), options)
    patient = options_for(tmp_path, "patient", folder=str(tmp_path / "s-*.tar"), max_bad=1)
    assert finetune(small_net(), patient).unreadable == (f"{last}/00020.png",)
