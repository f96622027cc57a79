"""Tar shards as people have them: truncated, compressed, with other labels and names; nothing is lost silently."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from condconv_surgery.data.data_check import check_data
from condconv_surgery.data.evaluation_images import find_evaluation_images
from condconv_surgery.data.webdataset_shards import scan_shards
from condconv_surgery.errors import InputError
from condconv_surgery.recipe.training_sections import DataOptions
from condconv_surgery.training import finetune
from tests.small_networks import small_net

Members = Iterable[tuple[str, bytes]]


def image(number: int, kind: str = "PNG") -> bytes:
    grey = np.random.default_rng(number).integers(0, 256, (8, 8)).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(grey).save(content, kind)
    return content.getvalue()


def shard(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def pairs(
    label: Callable[[int], bytes] = lambda i: b"%d" % (i % 3), name: str = "{:05}", kind: str = "png", of: str = "cls"
) -> Members:
    """Six images, each with its label."""
    both = [
        ((f"{name.format(i)}.{kind}", image(i, kind.upper())), (f"{name.format(i)}.{of}", label(i))) for i in range(6)
    ]
    return [member for pair in both for member in pair]


def described(of: Callable[[int], object]) -> Callable[[int], bytes]:
    return lambda i: json.dumps({"label": of(i)}).encode()


READ: dict[str, tuple[Members, tuple[str, ...]]] = {
    "upper case": (pairs(kind="PNG", of="CLS"), ("0", "1", "2")),
    "gif": (pairs(kind="gif"), ("0", "1", "2")),
    "avif": (pairs(kind="avif"), ("0", "1", "2")),
    "in folders": (pairs(name="a/b{}"), ("0", "1", "2")),
    "names in other encodings": (pairs(name="caf\xe9{}"), ("0", "1", "2")),
    "labels in other encodings": (pairs(lambda i: (b"caf\xe8", b"caf\xe9")[i % 2]), ("caf\\xe8", "caf\\xe9")),
    "json numbers": (pairs(described(lambda i: i % 3), of="json"), ("0", "1", "2")),
    "json names": (pairs(described(lambda i: ["cat", "dog"][i % 2]), of="json"), ("cat", "dog")),
}


@pytest.mark.parametrize("what", READ)
def test_shards_that_are_read(tmp_path: Path, what: str) -> None:
    members, classes = READ[what]
    found = scan_shards(str(shard(tmp_path / "s.tar", members)))
    assert (found.classes, len(found), found.skipped) == (classes, 6, ())
    assert found.labels == tuple(i % len(classes) for i in range(6))
    assert [np.asarray(found.open(i).convert("L")).shape for i in range(6)] == [(8, 8)] * 6
    assert all(found.name(i).isprintable() for i in range(6))


def test_the_label_of_a_cls_file_counts_where_there_is_json_too(tmp_path: Path) -> None:
    both = [*pairs(), *((f"{i:05}.json", b'{"label": 9}') for i in range(6))]
    found = scan_shards(str(shard(tmp_path / "s.tar", both)))
    assert (found.labels, found.skipped) == ((0, 1, 2, 0, 1, 2), ())


SKIPPED: dict[str, tuple[Members, dict[str, int]]] = {
    "captions": ([*pairs(), ("00000.txt", b"a cat")], {"not an image (.txt)": 1}),
    "two images of one name": ([*pairs(), ("00003.jpg", image(9, "JPEG"))], {"further ones of the same name": 1}),
    "a name again": ([*pairs(), *pairs()], {"further ones of the same name": 12}),
    "files of a Mac": ([*pairs(), ("._00000.png", b"\0\5"), ("__MACOSX/1.png", b"\0")], {"hidden": 2}),
    "a label alone": ([*pairs(), ("00009.cls", b"1")], {"label without an image": 1}),
}


@pytest.mark.parametrize("what", SKIPPED)
def test_what_is_not_read_is_counted_by_reason(tmp_path: Path, what: str) -> None:
    members, skipped = SKIPPED[what]
    found = check_data(str(shard(tmp_path / "s.tar", members)))
    assert (found.train + found.val, found.skipped) == (6, skipped)


REFUSED: dict[str, tuple[Members, str]] = {
    "a label out of range": (pairs(lambda i: b"4000000000"), r"has the label 4000000000(.|\n)*without large gaps"),
    "a negative label": (pairs(lambda i: b"-1"), r"00000\.cls has the label -1\."),
    "an empty label": (pairs(lambda i: b""), r"has the label ''"),
    "two kinds of labels": (pairs(lambda i: (b"0", b"2.0")[i % 2]), r"Some labels are numbers and some are names"),
    "no json": (pairs(lambda i: b"{", of="json"), r"00000\.json has no label"),
    "class folders": ([("a/1.png", image(1)), ("b/2.png", image(2))], r"no labels\.(.|\n)*Try: tar -xf .*s\.tar"),
    "names with dots": (pairs(name="v1.{}"), r"no labelled images \(skipped: 1 not an image \(\.0\.(.|\n)*has no dot"),
    "nothing": ([], r"s\.tar has no labelled images\."),
}


@pytest.mark.parametrize("what", REFUSED)
def test_shards_that_are_refused(tmp_path: Path, what: str) -> None:
    members, message = REFUSED[what]
    with pytest.raises(InputError, match=message):
        scan_shards(str(shard(tmp_path / "s.tar", members)))


def test_a_shard_that_is_cut_between_two_images_is_not_taken_for_a_smaller_one(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", pairs())
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        member = tar.getmembers()[6]
    for end in (member.offset, member.offset + 100, member.offset_data + 10, 0):
        path.write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"s\.tar is not a complete tar file: "):
            scan_shards(str(path))
    path.write_bytes(whole + whole)
    with pytest.raises(InputError, match=r"what follows byte \d+ is neither a file nor the end"):
        scan_shards(str(path))
    path.write_bytes(whole.rstrip(b"\0") + bytes(1024 + 511 - (len(whole.rstrip(b"\0")) - 1) % 512))  # no padding
    assert len(scan_shards(str(path))) == 6


def test_a_run_over_shards_is_measured_on_the_same_labels_or_not_at_all(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", pairs())
    data = {"folder": str(path), "image_size": 16, "batch_size": 3, "workers": 0}
    options = {"data": data, "schedule": {"epochs": 1}}
    finetune(small_net(), options, output=tmp_path / "run")
    assert len(find_evaluation_images(DataOptions(folder=str(tmp_path / "run"))).images) == 3
    shard(path, pairs(lambda i: b"%d" % (i % 2)))
    with pytest.raises(
        InputError, match=r"changed: 3 training and 3 validation images then, 4 and 2 now, with other classes or labels"
    ):
        find_evaluation_images(DataOptions(folder=str(tmp_path / "run")))


def test_a_run_with_its_own_validation_shards_is_told_to_measure_these(tmp_path: Path) -> None:
    """Its training images are no images that it did not train on, and nothing was split off."""
    train, val = shard(tmp_path / "train.tar", pairs()), shard(tmp_path / "val.tar", pairs())
    data = {"folder": str(train), "val": str(val), "image_size": 16, "batch_size": 3, "workers": 0}
    finetune(small_net(), {"data": data, "schedule": {"epochs": 1}}, output=tmp_path / "run")
    shard(train, pairs()[:-2])
    with pytest.raises(InputError) as error:
        find_evaluation_images(DataOptions(folder=str(tmp_path / "run")))
    said = str(error.value)
    assert "changed: 6 training and 6 validation images then, 5 and 6 now." in said
    assert f'data="{val}", whose validation images the run did not train on' in said
    assert "split" not in said


@pytest.mark.parametrize("name", ["s.tar.gz", "s.tgz", "s.tar"])
def test_compressed_shards_are_said_to_be(tmp_path: Path, name: str) -> None:
    content = gzip.compress(shard(tmp_path / "plain/s.tar", pairs()).read_bytes())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} is compressed(.|\n)*Try: gunzip < \S+{name} > PLAIN\.tar"):
        scan_shards(str(tmp_path / name))


def test_class_names_beside_shards(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", pairs())
    (tmp_path / "classes.txt").write_text("cat\ndog\nowl\n", encoding="utf-8-sig")
    assert scan_shards(str(path)).classes == ("cat", "dog", "owl")
    (tmp_path / "classes.txt").write_bytes(b"caf\xe9\ndog\nowl\n")
    assert scan_shards(str(path)).classes == ("caf\\xe9", "dog", "owl")
    (tmp_path / "classes.txt").write_text("crane\ndog\ncrane\n")
    with pytest.raises(InputError, match="has the name crane more than once"):
        scan_shards(str(path))


def test_a_folder_is_no_validation_of_shards(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", pairs())
    with pytest.raises(InputError, match=rf'{tmp_path} is a folder(.|\n)*data.val="{tmp_path}/\*\.tar"'):
        check_data(DataOptions(folder=str(path), val=str(tmp_path)))
    assert check_data(DataOptions(folder=str(path), val=f"{tmp_path}/*.tar")).val == 6


@pytest.mark.parametrize(("file", "fix"), [("s.tar", '"{}/*.tar"'), ("data-0.arrow", '"hf:{}"'), ("a.bin", '"FOLDER"')])
def test_a_folder_of_shards_or_of_a_saved_set_is_recognised(tmp_path: Path, file: str, fix: str) -> None:
    (tmp_path / file).write_bytes(b"\0")
    with pytest.raises(InputError) as caught:
        check_data(str(tmp_path))
    assert caught.value.fix == f"data={fix.format(tmp_path)}"
