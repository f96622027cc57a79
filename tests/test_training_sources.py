"""Data sets other than folders: torchvision's by name, tar shards, Hugging Face's, streams."""

from __future__ import annotations

import gc
import struct
import tarfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from condconv_surgery.errors import InputError, TrainingError
from condconv_surgery.recipe import InputSpec, TrainingOptions
from condconv_surgery.recipe.sections import DataOptions
from condconv_surgery.training import finetune
from condconv_surgery.training.distributed import World
from condconv_surgery.training.finding import find_data, require_data
from condconv_surgery.training.labelled import Labelled
from condconv_surgery.training.loading import open_data
from condconv_surgery.training.shards import expand_braces, scan_shards
from condconv_surgery.training.state import LAST, State, read_state, save_state
from condconv_surgery.training.torchvision_sets import SETS
from condconv_surgery.training.watching import Silent, StepView
from tests.pictures import write_pictures
from tests.small_networks import small_net


def pixels(pictures: Labelled, index: int) -> np.ndarray:
    with pictures.open(index) as picture:
        return np.asarray(picture)


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


# torchvision


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
    train, val = find_data(DataOptions(folder="torchvision:mnist", root=str(tmp_path)), 0)
    assert (len(train), len(val)) == (18, 18)
    assert train.classes[:2] == val.classes[:2] == ("0 - zero", "1 - one")
    assert train.labels[:4] == (0, 1, 2, 0)
    assert np.array_equal(pixels(train, 5), images[5])
    assert train.name(5) == "MNIST[5]"


def test_a_torchvision_set_in_one_piece_is_split() -> None:
    train, val = find_data(DataOptions(folder="torchvision:FakeData", val_fraction=0.3), 0)
    assert len(train) + len(val) == 1000
    assert set(train.labels) == set(val.labels) == set(range(10))
    assert not {train.name(i) for i in range(len(train))} & {val.name(i) for i in range(len(val))}


def test_a_torchvision_set_with_other_pictures_to_validate_on_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"data\.val = pictures with --data torchvision:cifar10(.|\n)*leave data\.val out"
    ):
        require_data(DataOptions(folder="torchvision:cifar10", val="pictures"))


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
        ("torchvision:celeba", "has many labels a picture"),
        ("torchvision:vocdetection", "has boxes"),
        ("torchvision:cifar10", r"CIFAR10 can't be read(.|\n)*--set data.download=true"),
    ],
)
def test_torchvision_sets_that_are_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_data(DataOptions(folder=name, root=str(tmp_path)), 0)


# shards


def write_shards(
    folder: Path, pattern: str = "s-%03d.tar", label: Callable[[int], dict[str, object]] | None = None
) -> Path:
    """Three shards with eight pictures each, written by webdataset itself."""
    webdataset = pytest.importorskip("webdataset")
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with webdataset.ShardWriter(str(folder / pattern), maxcount=8, verbose=0) as sink:
        for i in range(24):
            picture = rng.integers(0, 100, (20, 20, 3)).astype("uint8")
            picture[..., i % 3] += 120
            sink.write({"__key__": f"{i:05}", "png": picture, **(label(i) if label else {"cls": i % 3})})
    return folder


def test_shards_hold_what_webdataset_reads(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    pattern = str(write_shards(tmp_path) / "s-{000..002}.tar")
    pictures = scan_shards(pattern)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files to the garbage collector
        theirs = list(webdataset.WebDataset(pattern, shardshuffle=False).decode("pil").to_tuple("png", "cls"))
        gc.collect()
    assert pictures.labels == tuple(label for _, label in theirs)
    assert pictures.classes == ("0", "1", "2")
    for index, (picture, _) in enumerate(theirs):
        assert np.array_equal(pixels(pictures, index), np.asarray(picture))
    assert scan_shards(str(tmp_path / "s-*.tar")) == pictures


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
        (lambda i: {"txt": "a caption"}, "has no label for 00000.png"),
        (lambda i: {"cls": i if i % 2 else "odd"}, "Some labels are numbers and some are names"),
    ],
)
def test_shards_of_other_tasks_are_refused(
    tmp_path: Path, label: Callable[[int], dict[str, object]], message: str
) -> None:
    write_shards(tmp_path, label=label)
    with pytest.raises(InputError, match=message):
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
    with pytest.raises(InputError, match=r"not a \.tar file(.|\n)*gunzip"):
        require_data(DataOptions(folder=str(tmp_path / "z.tar.gz")))
    (tmp_path / "x.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(InputError, match="is no whole tar file"):
        scan_shards(str(tmp_path / "x.tar"))


def test_a_run_over_shards_is_a_run_over_the_same_folder(tmp_path: Path) -> None:
    """The same pictures in the same order give the same weights, wherever they lie and whoever reads them."""
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
        assert (result.train_pictures, result.val_pictures, result.classes) == (16, 8, ("0", "1", "2"))
        assert_same(of_folder, of_shards)


def test_a_shard_cut_short_has_unreadable_pictures(tmp_path: Path) -> None:
    write_shards(tmp_path)
    last = tmp_path / "s-002.tar"
    with tarfile.open(last) as tar:
        offset = next(m.offset_data for m in tar if m.name == "00020.png")
    content = bytearray(last.read_bytes())
    content[offset : offset + 40] = bytes(40)
    last.write_bytes(content)
    options = options_for(tmp_path, "run", folder=str(tmp_path / "s-*.tar"))
    with pytest.raises(InputError, match=r"unreadable picture.*s-002\.tar/00020\.png"):
        finetune(small_net(), options)
    patient = options_for(tmp_path, "patient", folder=str(tmp_path / "s-*.tar"), max_bad=1)
    assert finetune(small_net(), patient).unreadable == (f"{last}/00020.png",)


# Hugging Face


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A picture folder, a saved data set and a folder of parquet files, all with the same pictures."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    write_pictures(tmp_path / "folder/train", each=8)
    write_pictures(tmp_path / "folder/validation", each=3)
    found = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "folder"), cache_dir=str(tmp_path / "cache"))
    found.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "parquet").mkdir()
    for name, part in found.items():
        for shard in range(2):
            part.shard(2, shard).to_parquet(tmp_path / f"parquet/{name}-{shard}.parquet")
    return tmp_path


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from the net, nothing written outside."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    # Five seconds after each pass over several files, for threads of pyarrow that may still read from a net.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)


@pytest.mark.parametrize("place", ["saved", "parquet", "folder"])
def test_hugging_face_sets_hold_the_folders_pictures(rows: Path, place: str) -> None:
    train, val = find_data(DataOptions(folder=f"hf:{rows / place}"), 0)
    theirs, _ = find_data(DataOptions(folder=str(rows / "folder")), 0)
    assert (len(train), len(val), train.classes) == (24, 9, theirs.classes)

    def content(pictures: Labelled) -> list[tuple[int, bytes]]:
        return sorted((pictures.labels[i], pixels(pictures, i).tobytes()) for i in range(len(pictures)))

    assert content(train) == content(theirs)


def test_one_split_is_split_and_a_split_can_be_named(rows: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = datasets.load_from_disk(str(rows / "saved"))
    parts["train"].save_to_disk(str(rows / "one"))
    train, val = find_data(DataOptions(folder=f"hf:{rows / 'one'}", val_fraction=0.25), 0)
    assert (len(train), len(val)) == (18, 6)
    assert not {train.name(i) for i in range(18)} & {val.name(i) for i in range(6)}
    datasets.DatasetDict(train=parts["train"], held=parts["validation"]).save_to_disk(str(rows / "named"))
    _, held = find_data(DataOptions(folder=f"hf:{rows / 'named'}", val="held"), 0)
    assert len(held) == 9
    with pytest.raises(InputError, match=r"no split test\.\n.*train, held"):
        find_data(DataOptions(folder=f"hf:{rows / 'named'}", val="test"), 0)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ([[0, 1]] * 6, "many labels a picture"),
        ([0.5] * 6, "regression"),
        ([None, 1, 0, 1, 0, 1], "pictures without a label"),
    ],
)
def test_other_heads_are_refused_in_words(tmp_path: Path, label: list[object], message: str) -> None:
    datasets = pytest.importorskip("datasets")
    pictures = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(6)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    made = datasets.Dataset.from_dict({"image": pictures, "label": label}, features if label[0] is None else None)
    made.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(InputError, match=message):
        find_data(DataOptions(folder=f"hf:{tmp_path / 'set'}"), 0)


def test_columns_that_cannot_be_told(rows: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    part = datasets.load_from_disk(str(rows / "saved"))["train"]
    part.rename_columns({"label": "kind"}).cast_column("kind", datasets.Value("string")).save_to_disk(str(rows / "odd"))
    place = f"hf:{rows / 'odd'}"
    with pytest.raises(
        InputError, match=r"0 columns that may be the label\.\n.*kind \(Value\)\.\n.*data\.label=COLUMN"
    ):
        find_data(DataOptions(folder=place), 0)
    with pytest.raises(InputError, match="has no column cls"):
        find_data(DataOptions(folder=place, label="cls"), 0)
    train, val = find_data(DataOptions(folder=place, label="kind"), 0)
    assert train.classes == ("0", "1", "2")
    assert len(train) + len(val) == 24
    with pytest.raises(InputError, match="can't be read"):
        find_data(DataOptions(folder=f"hf:{tmp_path / 'nowhere'}"), 0)


# streams


def streamed(rows: Path, run: str, place: str = "parquet", **data: object) -> TrainingOptions:
    return options_for(rows, run, folder=f"hf:{rows / place}", streaming=True, buffer=7, **data)


@pytest.mark.parametrize("place", ["saved", "parquet"])
def test_a_stream_sees_every_picture_once_an_epoch(rows: Path, place: str) -> None:
    options = streamed(rows, "run", place, batch_size=8)
    spec = InputSpec(height=16, width=16)
    data = open_data(options, spec, World())
    assert (len(data.train), len(data.val), data.order.steps_per_epoch) == (24, 9, 3)
    batches = list(data.batches_from(0))
    assert len(batches) == 6
    one, two = (torch.cat([b.labels for b in batches[i : i + 3]]) for i in (0, 3))
    assert sorted(one.tolist()) == sorted(two.tolist()) == [0] * 8 + [1] * 8 + [2] * 8
    assert not torch.equal(one, two)
    assert sum(len(b.labels) for b in data.val_loader) == 9


def test_processes_share_a_stream_without_overlap(rows: Path) -> None:
    def labels_and_sums(rank: int, world: int, part: str) -> list[float]:
        options = streamed(rows, "run", batch_size=24, workers=0)
        options = options.updated({"augment": {"crop": [1.0, 1.0], "flip": 0.0}, "schedule": {"epochs": 1}})
        data = open_data(options, InputSpec(height=24, width=24), World(rank, world))
        loader = data.batches_from(0) if part == "train" else data.val_loader
        return [float(image.double().sum()) for batch in loader for image in batch.images]

    for part, count in (("train", 24), ("val", 9)):
        alone = labels_and_sums(0, 1, part)
        shared = [labels_and_sums(rank, 2, part) for rank in (0, 1)]
        assert len(set(alone)) == count
        assert sorted(shared[0] + shared[1]) == sorted(alone)


def test_a_streamed_run_goes_on_at_any_step_whatever_the_workers(rows: Path) -> None:
    import signal

    from tests.test_training_run import StopAt

    whole, cut = streamed(rows, "whole"), streamed(rows, "cut", workers=1)
    finetune(small_net(), whole)
    stopped = finetune(small_net(), cut, watcher=StopAt(8, signal.SIGTERM))
    assert stopped.steps == 8
    finetune(small_net(), cut, resume=True)
    assert_same(whole, cut)


def test_streams_that_are_refused(rows: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = datasets.load_from_disk(str(rows / "saved"))
    parts["train"].save_to_disk(str(rows / "one"))
    spec = InputSpec(height=16, width=16)
    with pytest.raises(InputError, match="has one split only"):
        open_data(streamed(rows, "run", "one"), spec, World())
    parts.cast_column("label", datasets.Value("int64")).save_to_disk(str(rows / "numbers"))
    with pytest.raises(InputError, match="doesn't say what its classes are"):
        open_data(streamed(rows, "run", "numbers"), spec, World())
    with pytest.raises(InputError, match=r"class_weights with data\.streaming"):
        open_data(streamed(rows, "run").updated({"optimizer": {"class_weights": True}}), spec, World())
    with pytest.raises(InputError, match="Only Hugging Face data sets are streamed"):
        require_data(replace(streamed(rows, "run").data, folder=str(rows)))


def test_a_stream_goes_on_with_as_many_processes_only(rows: Path) -> None:
    options = streamed(rows, "run", "saved")
    finetune(small_net(), options)
    state = read_state(Path(options.output) / LAST)
    save_state(Path(options.output), State(state.tensors, {**state.facts, "processes": 2}))
    with pytest.raises(InputError, match=r"with 2 processes and is resumed with 1(.|\n)*--nproc-per-node 2"):
        finetune(small_net(), options, resume=True)


def test_a_stream_that_breaks_off_ends_in_words(rows: Path) -> None:
    """A file that goes away while it is read, with the states saved before."""
    options = streamed(rows, "run", "parquet").updated({"engine": {"save_every": 2}})

    class Remove(Silent):
        def step(self, view: StepView) -> None:
            if view.step == 6:  # at an epoch's end: the next one opens the files anew
                for path in (rows / "parquet").glob("train-*.parquet"):
                    path.write_bytes(path.read_bytes()[:100])

    with pytest.raises(TrainingError, match=r"can't be read on after row \d+ of epoch 2(.|\n)*--resume"):
        finetune(small_net(), options, watcher=Remove())
    assert read_state(Path(options.output) / LAST).facts["progress"]["step"] == 6


def test_a_row_without_a_label_is_named(rows: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = datasets.load_from_disk(str(rows / "saved"))
    lost = parts["train"].map(
        lambda row, index: {"label": None if index == 5 else row["label"]},
        with_indices=True,
        features=parts["train"].features,
    )
    datasets.DatasetDict(train=lost, validation=parts["validation"]).save_to_disk(str(rows / "lost"))
    with pytest.raises(InputError, match=r"1 unreadable picture: .*row \d+ of epoch 1, which has no label"):
        finetune(small_net(), streamed(rows, "run", "lost"))


def test_an_unreadable_row_is_named_and_replaced(rows: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = datasets.load_from_disk(str(rows / "saved")).cast_column("image", datasets.Image(decode=False))

    def spoil(row: dict[str, dict[str, object]], index: int) -> dict[str, object]:
        return {"image": {"bytes": b"text", "path": "bad.png"}} if index == 5 else row

    spoilt = parts["train"].map(spoil, with_indices=True, features=parts["train"].features)
    made = datasets.DatasetDict(train=spoilt, validation=parts["validation"])
    made.cast_column("image", datasets.Image()).save_to_disk(str(rows / "spoilt"))
    result = finetune(small_net(), streamed(rows, "run", "spoilt", max_bad=1))
    assert len(result.unreadable) == 1
    assert result.unreadable[0].endswith("train: bad.png")
    still = options_for(rows, "still", folder=f"hf:{rows / 'spoilt'}")
    with pytest.raises(InputError, match=r"unreadable picture.*spoilt train\[5\]"):
        finetune(small_net(), still)
