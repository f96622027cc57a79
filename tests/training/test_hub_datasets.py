"""Images from Hugging Face data sets, kept or streamed: the same as in a folder."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from condconv_surgery.data.calibration_images import calibration_images
from condconv_surgery.data.data_check import check_data
from condconv_surgery.data.decode_image import decode_image
from condconv_surgery.data.evaluation_images import find_evaluation_images
from condconv_surgery.data.find_data import find_data, find_parts, require_data
from condconv_surgery.data.hub_streams import find_streams
from condconv_surgery.data.labelled_images import LabelledImages
from condconv_surgery.errors import InputError, TrainingError
from condconv_surgery.recipe import InputSpec, TrainingOptions
from condconv_surgery.recipe.training_sections import DataOptions
from condconv_surgery.training import finetune
from condconv_surgery.training.batches.loaders import open_data
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.monitor.callback import Callback, StepView
from condconv_surgery.training.state.run_state import LAST, State, read_state, save_state
from condconv_surgery.training.state.written_options import with_absolute_paths
from tests.images import write_images
from tests.small_networks import small_net
from tests.training.test_data_sources import assert_same, options_for, pixels


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """An image folder, a saved data set and a folder of parquet files, all with the same images."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    write_images(tmp_path / "folder/train", each=8)
    write_images(tmp_path / "folder/validation", each=3)
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
def test_hugging_face_sets_hold_the_folders_images(rows: Path, place: str) -> None:
    train, val = find_data(DataOptions(folder=f"hf:{rows / place}"), 0)
    theirs, _ = find_data(DataOptions(folder=str(rows / "folder")), 0)
    assert (len(train), len(val), train.classes) == (24, 9, theirs.classes)

    def content(images: LabelledImages) -> list[tuple[int, bytes]]:
        return sorted((images.labels[i], pixels(images, i).tobytes()) for i in range(len(images)))

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
        ([[0, 1]] * 6, "many labels per image"),
        ([0.5] * 6, "regression"),
        ([None, 1, 0, 1, 0, 1], "images without a label"),
    ],
)
def test_other_heads_are_refused(tmp_path: Path, label: list[object], message: str) -> None:
    datasets = pytest.importorskip("datasets")
    images = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(6)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    made = datasets.Dataset.from_dict({"image": images, "label": label}, features if label[0] is None else None)
    made.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(InputError, match=message):
        find_data(DataOptions(folder=f"hf:{tmp_path / 'set'}"), 0)


def test_columns_that_cannot_be_told(rows: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    part = datasets.load_from_disk(str(rows / "saved"))["train"]
    part.rename_columns({"label": "kind"}).cast_column("kind", datasets.Value("string")).save_to_disk(str(rows / "odd"))
    place = f"hf:{rows / 'odd'}"
    with pytest.raises(
        InputError, match=r'0 columns that may be the label\.\n.*kind \(Value\)\.\n.*data\.label="COLUMN"'
    ):
        find_data(DataOptions(folder=place), 0)
    with pytest.raises(InputError, match="has no column cls"):
        find_data(DataOptions(folder=place, label="cls"), 0)
    train, val = find_data(DataOptions(folder=place, label="kind"), 0)
    assert train.classes == ("0", "1", "2")
    assert len(train) + len(val) == 24
    with pytest.raises(InputError, match="can't be read"):
        find_data(DataOptions(folder=f"hf:{tmp_path / 'nowhere'}"), 0)


def named_rows(names: Sequence[object], kind: str | None = None) -> Any:
    """A row for each label; ``kind``: the type of the column, else a ClassLabel."""
    datasets = pytest.importorskip("datasets")
    label = datasets.Value(kind) if kind else datasets.ClassLabel(names=["cat", "dog"])
    images = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(len(names))]
    features = datasets.Features({"image": datasets.Image(), "label": label})
    return datasets.Dataset.from_dict({"image": images, "label": list(names)}, features)


@pytest.mark.parametrize(
    ("labels", "kind", "classes"),
    [
        (["owl", "zebra", "ant"] * 2, "string", ("ant", "owl", "zebra")),
        ([200, 5, 17] * 2, "int64", ("5", "17", "200")),
        ([True, False] * 3, "bool", ("False", "True")),
    ],
)
def test_labels_that_are_no_class_labels_are_sorted(
    tmp_path: Path, labels: list[object], kind: str, classes: tuple[str, ...]
) -> None:
    named_rows(labels, kind).save_to_disk(str(tmp_path / "set"))
    train = find_parts(DataOptions(folder=f"hf:{tmp_path / 'set'}")).train
    assert (train.classes, [train.classes[label] for label in train.labels]) == (classes, [str(x) for x in labels])


def test_a_test_split_without_labels_is_left_alone(tmp_path: Path) -> None:
    """As ImageNet's on the hub."""
    datasets = pytest.importorskip("datasets")
    test = named_rows([-1] * 4)
    parts = datasets.DatasetDict(train=named_rows([0, 1] * 5), test=test, unsupervised=test)
    parts.save_to_disk(str(tmp_path / "set"))
    check = check_data(f"hf:{tmp_path / 'set'}")
    assert (check.train, check.val) == (8, 2)
    assert f"{tmp_path}/set test is not used: test images do not select." in check.validation
    assert check.validation.endswith("Not read: the split unsupervised.")
    with pytest.raises(InputError, match="set test has images without a label"):
        find_evaluation_images(DataOptions(folder=f"hf:{tmp_path / 'set'}"))


def test_two_splits_of_other_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = datasets.DatasetDict(first=named_rows([0, 1] * 5), second=named_rows([0] * 4))
    parts.save_to_disk(str(tmp_path / "set"))
    place = f"hf:{tmp_path / 'set'}"
    with pytest.raises(InputError, match=r'the splits first, second(.|\n)*Try: data\.val="second"'):
        check_data(place)
    check = check_data(DataOptions(folder=place, val="second"))
    assert (check.train, check.val, check.validation) == (10, 4, f"{tmp_path}/set second.")
    assert check.without_validation == ("dog",)


@pytest.mark.parametrize("name", ["parquet", "imagefolder", "a#b", "with space"])
def test_local_folders_of_any_name(rows: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a name that the datasets library has for a format, and one with the mark of a configuration."""
    (rows / "parquet").rename(rows / "moved")
    (rows / "moved").rename(rows / name)
    monkeypatch.chdir(rows)
    train, val = find_data(DataOptions(folder=f"hf:{name}"), 0)
    assert (len(train), len(val)) == (24, 9)
    file = find_parts(DataOptions(folder=f"hf:{name}/train-0.parquet"))
    assert (len(file.train), file.val) == (12, None)
    written = with_absolute_paths(TrainingOptions().updated({"data": {"folder": f"hf:{name}"}, "output": "run"}))
    assert written.data.folder == f"hf:{rows / name}"


def test_sets_without_rows_or_name_and_cells_without_image(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    named_rows([0, 1] * 5).to_parquet(tmp_path / "set/train.parquet")
    named_rows([]).to_parquet(tmp_path / "set/validation.parquet")
    with pytest.raises(InputError, match=r"set can't be read: .*validation"):
        check_data(f"hf:{tmp_path / 'set'}")
    datasets.DatasetDict(train=named_rows([])).save_to_disk(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="nothing can't be read"):
        check_data(f"hf:{tmp_path / 'nothing'}")
    with pytest.raises(InputError, match="names no data set"):
        check_data("hf:")
    lost = named_rows([0, 1] * 5).map(lambda row, i: {"image": None if i == 3 else row["image"]}, with_indices=True)
    lost.save_to_disk(str(tmp_path / "lost"))
    assert check_data(f"hf:{tmp_path / 'lost'}").unreadable == {"missing": 1}


def test_a_cache_that_cannot_be_written_is_named(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def read_only(*args: object, **how: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "/cache/a.lock")

    monkeypatch.setattr(datasets, "load_dataset", read_only)
    with pytest.raises(InputError, match=r"can't be stored: (.|\n)*hf-cache\.(.|\n)*Try: HF_DATASETS_CACHE=FOLDER"):
        check_data(f"hf:{rows / 'parquet'}")


def streamed(rows: Path, run: str, place: str = "parquet", **data: object) -> TrainingOptions:
    return options_for(rows, run, folder=f"hf:{rows / place}", streaming=True, buffer=7, **data)


@pytest.mark.parametrize("place", ["saved", "parquet"])
def test_a_stream_sees_every_image_once_an_epoch(rows: Path, place: str) -> None:
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


def test_what_a_streamed_run_proposes_next_works(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stream does not list its images: the set that it reads is measured instead."""
    finetune(small_net(), streamed(rows, "run"))
    following = capsys.readouterr().err.splitlines()[-1]
    assert following == f'Next: report(load("{rows}/run/best.safetensors"), data="hf:{rows}/parquet")'
    assert len(find_evaluation_images(DataOptions(folder=f"hf:{rows}/parquet")).images) == 9


def test_a_streamed_run_goes_on_at_any_step_whatever_the_workers(rows: Path) -> None:
    import signal

    from tests.training.test_training_run import StopAt

    whole, cut = streamed(rows, "whole"), streamed(rows, "cut", workers=1)
    finetune(small_net(), whole)
    stopped = finetune(small_net(), cut, callback=StopAt(8, signal.SIGTERM))
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
    with pytest.raises(InputError, match="does not name its classes"):
        open_data(streamed(rows, "run", "numbers"), spec, World())
    with pytest.raises(InputError, match=r"class_weights=True with data\.streaming=True"):
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


def test_a_stream_that_breaks_off_ends_with_an_error(rows: Path) -> None:
    """A file that goes away while it is read, with the states saved before."""
    options = streamed(rows, "run", "parquet").updated({"engine": {"save_every": 2}})

    class Remove(Callback):
        def step(self, view: StepView) -> None:
            if view.step == 6:  # at an epoch's end: the next one opens the files anew
                for path in (rows / "parquet").glob("train-*.parquet"):
                    path.write_bytes(path.read_bytes()[:100])

    with pytest.raises(TrainingError, match=r"can't be read on after row \d+ of epoch 2(.|\n)*resume=True"):
        finetune(small_net(), options, callback=Remove())
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
    with pytest.raises(InputError, match=r"1 unreadable image: .*row \d+ of epoch 1, which has no label"):
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
    with pytest.raises(InputError, match=r"unreadable image.*spoilt train\[5\]"):
        finetune(small_net(), still)


def test_a_test_split_does_not_select_and_images_are_upright(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    exif = Image.Exif()
    exif[0x0112] = 6
    files = []
    for i in range(12):
        files.append(str(tmp_path / f"{i}.jpg"))
        Image.new("RGB", (20, 8), (20 * i, 90, 0)).save(files[-1], exif=exif)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"image": files, "label": [i % 2 for i in range(12)]}, features)
    datasets.DatasetDict(Training=rows, test=rows.select(range(4))).save_to_disk(str(tmp_path / "set"))
    options = DataOptions(folder=f"hf:{tmp_path / 'set'}")
    train, val = find_data(options, 0)
    assert (len(train), len(val)) == (10, 2)
    assert decode_image(lambda: train.open(0)).size == (8, 20)
    measured, held_out, _ = find_evaluation_images(options)
    assert (len(measured), held_out) == (4, True)
    assert sum(len(batch) for batch in calibration_images(options.folder, InputSpec(height=8, width=8))) == 12
    chosen = DataOptions(folder=options.folder, val="test")
    assert [len(part) for part in find_data(chosen, 0)] == [12, 4]
    with pytest.raises(InputError, match=r'no validation split, only Training and test(.|\n)*data\.val="test"'):
        find_streams(DataOptions(folder=options.folder, streaming=True))
