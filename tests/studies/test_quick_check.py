"""Can conversion pay at all? The answers, and two runs that give one of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from condconv_surgery.errors import DamagedFileError, InputError
from condconv_surgery.recipe import CondConv
from condconv_surgery.reporting import Difference
from condconv_surgery.studies import QuickCheck, quick_check
from tests.images import write_images
from tests.small_networks import small_net
from tests.small_study import study_options


def found(train: float, val: float, gain: float, half: float = 0.01) -> QuickCheck:
    return QuickCheck((10, 20), (train - 0.01, train), (val - gain, val), Difference(gain, half, 1, 500))


def test_the_four_answers() -> None:
    fits = found(0.995, 0.77, 0.0)
    assert (fits.limit, fits.improves) == ("data", False)
    assert fits.verdict.startswith("Conversion is unlikely to pay: the network fits its training images (99.5%)")
    growing = found(0.70, 0.68, 0.05)
    assert growing.improves
    assert growing.verdict.startswith("Train longer first: the static network still improves (+5.0 ± 1.0 points")
    overfits = found(0.92, 0.75, 0.002)
    assert overfits.limit == "mostly data"
    assert overfits.verdict.startswith("Conversion may pay little: the network is trained out (+0.2 ± 1.0 points")
    limited = found(0.79, 0.76, 0.002)
    assert limited.limit == "capacity"
    assert limited.verdict.startswith("Conversion can pay: the network is trained out")
    assert json.loads(json.dumps(limited.to_dict()))["verdict"] == limited.verdict


def test_a_gain_within_its_interval_is_no_improvement() -> None:
    assert not found(0.7, 0.68, 0.05, half=0.06).improves


def test_a_wide_interval_is_no_evidence_of_a_network_that_is_trained_out() -> None:
    check = QuickCheck((10, 20), (0.45, 0.60), (10 / 24, 14 / 24), Difference(1 / 6, 0.196, 1, 24))
    assert (check.limit, check.is_trained_out) == ("not known", False)
    assert check.verdict == (
        "Not known: there is no evidence that the network is trained out (+16.7 ± 19.6 points with twice the steps; on "
        "training images +15.0); more validation images (now 24) and longer training (now 10 and 20 epochs) would tell."
    )
    noisy = found(0.70, 0.68, 0.0, half=0.03)
    assert noisy.verdict.endswith("; more validation images (now 500) would tell.")
    nearly = found(0.70, 0.68, 0.009, half=0.012)
    assert nearly.verdict.endswith("; longer training (now 10 and 20 epochs) would tell.")


def test_a_gain_on_training_images_alone_is_not_trained_out() -> None:
    fitting = QuickCheck((10, 20), (0.70, 0.80), (0.65, 0.65), Difference(0.0, 0.01, 1, 500))
    assert fitting.limit == "not known"
    assert fitting.verdict.endswith("on training images +10.0); longer training (now 10 and 20 epochs) would tell.")


def test_a_network_at_chance_has_learnt_nothing() -> None:
    third = (1 / 3, 1 / 3)
    check = QuickCheck((1, 2), third, third, Difference(0.0, 0.561, 1, 6), chance=1 / 3, train_images=18)
    assert (check.limit, check.has_learnt) == ("not known", False)
    assert check.verdict.startswith(
        "The network has learnt nothing at this rate: its top-1 on training images (33.3%) is not above chance (33.3%)"
    )
    lucky = QuickCheck((1, 2), (0.35, 0.36), third, Difference(0.0, 0.01, 1, 500), chance=1 / 3, train_images=200)
    assert not lucky.has_learnt
    weak = QuickCheck((1, 2), (0.35, 0.36), third, Difference(0.0, 0.01, 1, 500), chance=1 / 3, train_images=2000)
    assert weak.has_learnt


def test_an_untrained_network_is_at_chance(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", each=10)
    options = study_options(optimizer={"lr": 1e-9}, schedule={"epochs": 1})
    check = quick_check(small_net(dropout=0.0), options, data=data, output=tmp_path / "study", progress=False)
    assert isinstance(check, QuickCheck)
    assert (check.chance, check.train_images) == (pytest.approx(1 / 3), 18)
    assert check.verdict.startswith("The network has learnt nothing at this rate")


def test_another_model_image_or_option_needs_another_folder(tmp_path: Path) -> None:
    data, other = write_images(tmp_path / "data", each=10), write_images(tmp_path / "other", each=9)
    options, output = study_options(schedule={"epochs": 1}), tmp_path / "study"

    def check(seed: int = 0, images: Path = data, **changes: dict[str, object]) -> object:
        chosen = {**options, **{name: {**options.get(name, {}), **values} for name, values in changes.items()}}
        return quick_check(small_net(dropout=0.0, seed=seed), chosen, data=images, output=output, progress=False)

    first = check()
    with pytest.raises(
        InputError, match=r'holds a quick check with other settings: model was .*\n.*\n.*another output="S'
    ):
        check(seed=1)
    with pytest.raises(InputError, match=r"other settings: images\."):
        check(images=other)
    with pytest.raises(InputError, match=r"other settings: training\.optimizer\.lr was 0\.01 and is 0\.02"):
        check(optimizer={"lr": 0.02})
    assert check() == first
    longer = check(schedule={"epochs": 2})
    assert isinstance(longer, QuickCheck)
    assert isinstance(first, QuickCheck)
    assert longer.val_top1[0] == first.val_top1[1], "the run of two epochs is not trained again"
    (output / "quick/settings.json").write_text("[")
    with pytest.raises(DamagedFileError, match=r"settings\.json cannot be read"):
        check()
    (output / "quick/settings.json").unlink()
    with pytest.raises(InputError, match="model was None"):
        check()


def test_an_easy_task_is_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("condconv_surgery.training.run.draw_curves", lambda rows, path: None)
    data = write_images(tmp_path / "data", each=30)
    options = study_options(schedule={"epochs": 6}, optimizer={"lr": 0.05})
    check = quick_check(small_net(dropout=0.0), options, data=data, output=tmp_path / "study")
    assert check is not None
    assert check.epochs == (6, 12)
    assert check.limit == "data"
    assert "57 training, 15 validation and 18 test images" in check.origin
    rows = (tmp_path / "study/quick/12/metrics.jsonl").read_text().splitlines()
    assert check.val_top1[1] == pytest.approx(json.loads(rows[-1])["val_top1"])
    again = quick_check(small_net(dropout=0.0), options, data=data, output=tmp_path / "study")
    assert again == check, "a repeated call trains nothing again"
    assert len((tmp_path / "study/quick/12/metrics.jsonl").read_text().splitlines()) == len(rows)
    with pytest.raises(InputError, match="converted already"):
        quick_check(small_net(CondConv(2)), options, data=data, output=tmp_path / "other")
