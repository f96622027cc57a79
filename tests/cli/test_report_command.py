from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

import condconv_surgery as cs
from condconv_surgery.models.sources import load_model
from condconv_surgery.training.state.image_record import write_image_record
from tests.conftest import Run
from tests.images import find_training_images, write_images
from tests.variant_cases import scramble

PLAIN = ("torchvision:mobilenet_v3_small", "--weights", "none", "--input-size", 64)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load_model("torchvision:mobilenet_v3_small", weights="none", num_classes=3, input_size=64)
    converted = cs.convert(model, cs.CondConv(4), include=["features.1[0-2]*"], prove=False).model
    scramble(converted)
    path = tmp_path_factory.mktemp("models") / "small.safetensors"
    cs.save(converted, path)
    return path


def test_a_table_of_80_columns(condconv: Run, artifact: Path) -> None:
    code, out, err = condconv("report", artifact)
    assert code == 0, err
    assert max(len(line) for line in out.splitlines()) <= 80
    assert "condconv" in out
    assert "peak activations, batch 8" in out
    assert "Loading" in err


def test_a_half_precision_file_is_reported_as_it_is(condconv: Run, artifact: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.safetensors"
    cs.save(cs.load(artifact).half(), half)
    images = write_images(tmp_path / "images", classes=3, each=2)
    sizes = []
    for options in ((artifact,), (half, "--data", images)):
        code, out, err = condconv("report", *options, "--json")
        assert code == 0, err
        sizes.append(sum(layer["weight_bytes"] for layer in json.loads(out)["layers"]))
    assert abs(sizes[1] / sizes[0] - 0.5) < 0.01
    assert json.loads(out)["routing"]["images"] == 6


def test_json_is_what_other_software_leans_on(condconv: Run, artifact: Path) -> None:
    code, out, err = condconv("report", artifact, "--json")
    assert code == 0, err
    data = json.loads(out)
    model = cs.load(artifact)
    macs = data["macs"]
    assert data["parameters"]["after"] == sum(p.numel() for p in model.parameters())
    assert data["parameters"]["before"] == sum(
        p.numel() for p in torchvision.models.mobilenet_v3_small(num_classes=3).parameters()
    )
    assert (
        macs["after"]
        == macs["convolution"] + macs["mixing"] + macs["routing"]
        == macs["before"] + (macs["mixing"] + macs["routing"])
    )
    assert sum(layer["parameters"] for layer in data["layers"]) == data["parameters"]["after"]
    assert data["other_counters"]["macs"]["torchinfo"] < macs["before"] < data["other_counters"]["macs"]["fvcore"]


def test_csv_and_markdown(condconv: Run, artifact: Path) -> None:
    code, out, _ = condconv("report", artifact, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0
    assert rows[-1]["name"] == "total"
    code, out, _ = condconv("report", artifact, "--markdown")
    assert code == 0
    assert out.startswith("# torchvision:mobilenet_v3_small\n")
    assert "| latency" not in out


def test_a_plain_model(condconv: Run) -> None:
    code, out, err = condconv("report", *PLAIN, "--json")
    assert code == 0, err
    data = json.loads(out)
    assert data["macs"]["before"] == data["macs"]["after"]
    assert data["converted"] == 0


def test_routing_page_and_plots(condconv: Run, artifact: Path, tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", classes=3, each=3)
    page, plots = tmp_path / "r.html", tmp_path / "plots"
    code, out, err = condconv("report", artifact, "--data", data, "--html", page, "--plots", plots, "--json")
    assert code == 0, err
    routing = json.loads(out)["routing"]
    assert routing["images"] == 9
    assert len(routing["layers"]) == json.loads(out)["converted"]
    assert 0 <= routing["mean_gate_accuracy"] <= 1
    text = page.read_text(encoding="utf-8")
    assert "Gates by class" in text
    assert re.search(r'<div class="tile">latency<b>[\d.]+ m?s</b><span class="soft">x[\d.]+ vs original', text)
    for fact in (f"{artifact} (", f"9 images of {data}", f"condconv report {artifact} --data {data}", "torch 2."):
        assert fact in text, "provenance"
    assert (plots / "experts.svg").is_file()


def test_moved_from_the_original(condconv: Run, artifact: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.pt"
    torch.save(torchvision.models.mobilenet_v3_small(num_classes=3).state_dict(), plain)
    code, out, err = condconv("report", artifact, "--original", plain, "--json")
    assert code == 0, err
    assert all(row["moved"] > 0 for row in json.loads(out)["experts"])


def test_latency_and_dtype(condconv: Run, artifact: Path) -> None:
    code, out, err = condconv("report", artifact, "--latency", "--batch", 2, "--dtype", "bfloat16", "--json")
    assert code == 0, err
    data = json.loads(out)
    assert [row["batch"] for row in data["cost"]["latency_seconds"]] == [1, 2]
    assert all(row["ratio"] > 0 for row in data["cost"]["latency_seconds"])
    assert data["cost"]["environment"]["torch"] == torch.__version__
    single = json.loads(condconv("report", artifact, "--json")[1])
    assert data["layers"][0]["weight_bytes"] * 2 == single["layers"][0]["weight_bytes"]


def test_rounded_experts(condconv: Run, artifact: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", classes=3, each=4)
    rounded = cs.round_experts(cs.load(artifact), "int8").model
    code, out, err = condconv("report", artifact, *PLAIN, "--data", images, "--round-experts", "int8", "--json")
    assert code == 0, err
    measured = json.loads(out)["models"][0]
    assert measured["accuracy"] == cs.report(rounded, data=images).to_dict()["accuracy"]
    held = sum(tensor.nbytes for tensor in rounded.state_dict().values())
    assert sum(layer["weight_bytes"] for layer in measured["layers"]) == held
    assert "Experts of" in err
    assert "has no experts to round" in err

    code, out, err = condconv("predict", artifact, "--data", images, "--round-experts", "int8", "--json")
    assert code == 0, err
    assert json.loads(out)["accuracy"] == cs.predict(rounded, data=images).to_dict()["accuracy"]


def test_side_by_side(condconv: Run, artifact: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "best.safetensors").write_bytes(artifact.read_bytes())
    (run / "metrics.jsonl").write_text('{"val_top1": 0.625, "best": true}\n')
    best, page = run / "best.safetensors", tmp_path / "c.html"
    code, out, err = condconv("report", artifact, best, "--html", page, "--no-latency")
    assert code == 0, err
    assert "62.5%" in out
    assert max(len(line) for line in out.splitlines()) <= 80
    assert "<svg" in page.read_text(encoding="utf-8")
    models = json.loads(condconv("report", artifact, best, "--json")[1])["models"]
    assert [model["accuracy"] for model in models] == [None, 0.625]


def test_scores_that_runs_recorded_on_other_data_are_labelled(condconv: Run, artifact: Path, tmp_path: Path) -> None:
    for name, folder in (("a", "base"), ("b", "other")):
        run = tmp_path / name
        run.mkdir()
        (run / "best.safetensors").write_bytes(artifact.read_bytes())
        (run / "metrics.jsonl").write_text('{"val_top1": 0.625, "best": true}\n')
        (run / "data.json").write_text('{"train": 32, "val": 8}')
        (run / "recipe.toml").write_text(f'[data]\nfolder = "{folder}"\n')
    models = [tmp_path / name / "best.safetensors" for name in "ab"]
    code, out, err = condconv("report", *models)
    assert code == 0, err
    words = " ".join(out.split())
    assert (
        "* as its own run recorded: a on 8 validation images of base (seed 0); b on 8 validation images of other"
        in words
    )
    assert "not of the same images" in words


def test_models_on_the_same_images_have_a_paired_difference(condconv: Run, artifact: Path, tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", classes=3, each=4)
    code, out, err = condconv("report", artifact, artifact, "--data", data, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["differences"][1]["mean"] == 0.0
    assert found["differences"][1]["images"] == 12
    text = condconv("report", artifact, artifact, "--data", data)[1]
    assert "may have been trained on these images" in " ".join(text.split())


def test_predictions_as_csv(condconv: Run, artifact: Path, tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", classes=3, each=4)
    code, out, err = condconv("predict", artifact, "--data", data)
    assert code == 0, err
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 12
    assert set(rows[0]) == {"image", "label", "predicted", "confidence", "correct"}
    assert "Calibration: mean confidence" in err
    file = tmp_path / "p.csv"
    code, out, err = condconv("predict", artifact, "--data", data, "-o", file, "--json")
    assert code == 0, err
    assert file.read_text() == condconv("predict", artifact, "--data", data)[1]
    found = json.loads(out)
    assert found["accuracy"] == sum(int(row["correct"]) for row in rows) / 12
    assert sum(map(sum, found["confusion"])) == 12
    code, out, err = condconv("predict", artifact)
    assert (code, out) == (2, "")
    assert "predict needs images" in err


def test_the_word_run_names_the_run_of_the_model(condconv: Run, artifact: Path, tmp_path: Path) -> None:
    data, run = write_images(tmp_path / "data", classes=3, each=5), tmp_path / "first"
    run.mkdir()
    (run / "best.safetensors").write_bytes(artifact.read_bytes())
    (run / "recipe.toml").write_text(f'[data]\nfolder = "{data}"\n')
    code, out, err = condconv("predict", run / "best.safetensors", "--data", "run")
    assert code == 0, err
    assert len(out.splitlines()) == 1 + 3
    assert f"(validation images of {run})" in err
    code, _, err = condconv("predict", *PLAIN, "--data", "run")  # a name has no run: not what lies in this folder
    assert code == 2
    assert "There is no run" in err


def test_images_that_trained_the_model_are_said_to_have_trained_it(
    condconv: Run, artifact: Path, tmp_path: Path
) -> None:
    """The validation images of one run are training images of another that splits the same folder by another seed."""
    data = write_images(tmp_path / "data", classes=3, each=5)
    for seed, run in enumerate((tmp_path / "first", tmp_path / "second")):
        train, val = find_training_images(data, seed=seed)
        run.mkdir()
        (run / "best.safetensors").write_bytes(artifact.read_bytes())
        (run / "recipe.toml").write_text(f'seed = {seed}\n[data]\nfolder = "{data}"\n')
        write_image_record(run, train, val)
    measured = {val.name(i) for i in range(len(val))}
    first = find_training_images(data, seed=0)[1]
    shared = sum(first.name(i) not in measured for i in range(len(first)))
    assert shared > 0
    (tmp_path / "link").symlink_to(tmp_path / "first")
    said = f"{shared} of these 3 images trained this model ({tmp_path / 'second'}): with this run as the data"
    for source in ("first", "link"):
        code, out, err = condconv("predict", tmp_path / "second", "--data", tmp_path / source, "--json")
        assert code == 0, err
        assert said in err
        assert (json.loads(out)["held_out"], json.loads(out)["trained"]) == (False, shared)
    models = [tmp_path / "first", tmp_path / "second/best.safetensors"]
    code, out, err = condconv("report", *models, "--data", tmp_path / "first", "--markdown")
    assert code == 0, err
    assert said in out
    assert f", {shared} of which trained second" in out
    code, out, err = condconv("report", models[1], "--data", tmp_path / "first", "--json")
    assert said in json.loads(out)["routing"]["verdict"]
    assert f", {shared} of which trained it" in json.loads(out)["answer"]
    for model in models:  # on its own images nothing limits it
        code, _, err = condconv("predict", model, "--data", "run")
        assert code == 0, err
        assert "trained this" not in err


BAD = [
    ((), ("--json", "--csv"), "stdout has one form"),
    ((), ("--batch", 0), "must be at least 1"),
    ((), ("--dtype", "bfloat61"), "Nearest: bfloat16"),
    ((), ("--round-experts", "int4"), "Nearest: int8"),
    ((), ("--round-experts", "int8", "--runtime", "onnx"), "--round-experts with --runtime"),
    ((), ("--device", "nowhere"), "--device nowhere"),
    ((), ("--data", "nowhere"), "There is no nowhere"),
    ((), ("--html", "nowhere/r.html"), "could not be written"),
    ((), ("--html", "."), "could not be written"),
    ((), ("--plots", __file__), "cannot be made in"),
    ((), ("--original", "nowhere.pt"), "does not exist"),
    (("nowhere.safetensors",), (), "does not exist"),
    (("torchvision:resnet81", "--weights", "none"), (), "resnet18"),
]


@pytest.mark.parametrize(("model", "flags", "words"), BAD, ids=lambda value: str(value)[:24])
def test_bad_input_ends_in_words(
    condconv: Run, artifact: Path, model: tuple[object, ...], flags: tuple[object, ...], words: str
) -> None:
    code, out, err = condconv("report", *(model or (artifact,)), *flags)
    assert code == 2
    assert out == "", "nothing but words on stderr"
    assert words in err
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [["report", "--help"], ["report", "m.safetensors", "--jso"]])
def test_help_and_typos_do_not_import_torch(arguments: list[str]) -> None:
    program = (
        "import sys; sys.argv = ['condconv', *sys.argv[1:]]\n"
        "from condconv_surgery.cli.main import run\n"
        "try: run()\n"
        "finally: print('torch' in sys.modules, 'matplotlib' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "False False"


MEASURE = """
import gc, pathlib, time, torch, torchvision
from condconv_surgery import CondConv, convert, report
def status(name):
    return next(int(l.split()[1]) for l in pathlib.Path("/proc/self/status").open() if l.startswith(name))
torch.set_num_threads(1)
model = convert(torchvision.models.resnet50(weights=None).eval(), CondConv(8), prove=False, inplace=True).model
report(torch.nn.Conv2d(3, 3, 1), inputs=torch.randn(1, 3, 8, 8))  # what is imported late is not the report's
size = sum(p.numel() * 4 for p in model.parameters())
gc.collect()
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins here, not in the conversion
begin, before = time.process_time(), status("VmRSS")
report(model)
print(time.process_time() - begin, (status("VmHWM") - before) * 1024 / size)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resnet50_with_8_experts_in_3_seconds_and_half_its_size() -> None:
    """Seconds of one processor: what a clock shows depends on who else is at work."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    seconds, share = map(float, done.stdout.split())
    assert seconds < 3
    assert share < 0.5
