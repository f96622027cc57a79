"""Library messages name Python arguments; each command prints its own flags."""

from __future__ import annotations

import pytest
import typer.main
from condconv_surgery.cli.main import app
from condconv_surgery.cli.translate_arguments import TranslatingCommand, to_flags
from typer.testing import CliRunner

from condconv_surgery.errors import InputError, SurgeryError
from tests.conftest import Run

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]

CONVERT = [
    ('include=["layer5.*"] matched 0 of 20', '--include "layer5.*" matched 0 of 20'),
    ('include=["layer4.*", "fc"]', '--include "layer4.*" --include fc'),
    ('include=("layer4.*",)', '--include "layer4.*"'),
    ("include='layer4.*'", '--include "layer4.*"'),
    ("not matched by include=", "not matched by --include"),
    ("matched by `exclude=`.", "matched by `--exclude`."),
    ('exclude=["re:layer[34]\\\\..*"] as well', "--exclude 're:layer[34]\\..*' as well"),
    ('exclude=["re:a\\.b[\'\\"]"]', "--exclude 're:a\\.b['\"'\"'\"]'"),
    ('exclude=["re:("] is not', '--exclude "re:(" is not'),
    ("the stem (skip_stem=False converts it)", "the stem (--no-skip-stem converts it)"),
    ("skip_pooled=True.", "--skip-pooled."),
    ("classifier=True asks", "--classifier asks"),
    ("classifier=False", "no --classifier"),
    ("leave classifier= out", "leave --classifier out"),
    ("8 channels, fewer than min_channels=16", "8 channels, fewer than --min-channels 16"),
    ("tolerance=1e-4.", "--tolerance 1e-4."),
    ("tolerance=-1, or", "--tolerance -1, or"),
    ('routing="block"', "--routing block"),
    ('blocks=["layer4.*"] without routing="block"', '--block "layer4.*" without --routing block'),
    ('subclasses=["a.B"]', "--subclass a.B"),
    ("arch=torchvision:NAME, timm:NAME", "--arch torchvision:NAME, timm:NAME"),
    ("variant=odconv", "--variant odconv"),
    ('output="my model.safetensors"', '-o "my model.safetensors"'),
    ("model=", "MODEL"),
    ('model="a b.pt"', '"a b.pt"'),
    ('trust=["$x"]', "--trust '$x'"),
    ("weights=FILE, or weights=none for random ones", "--weights FILE, or --weights none for random ones"),
    ("arch=None", "no --arch"),
    ("include=[]", "no --include"),
    ("include=...", "--include"),
    ("dry_run=True lists them", "--dry-run lists them"),
    ("as_json=True and json=True", "--json and --json"),
    (
        'routing="block", include=["a.*"], exclude=["b"], or more',
        '--routing block --include "a.*" --exclude b, or more',
    ),
    ("convert(model, CondConv(experts=4))", "condconv convert MODEL -o FILE.safetensors"),
    ('load_model("a/b.pt")', "condconv convert a/b.pt -o FILE.safetensors"),
]
FINETUNE = [
    ("data.batch_size=32", "--batch-size 32"),
    ("batch_size=32", "--batch-size 32"),
    ('data.folder="x-{00..07}.tar"', '--data "x-{00..07}.tar"'),
    ("data.folder=hf:NAME#CONFIG", "--data hf:NAME#CONFIG"),
    ('layers.freeze=["layer1.*", "fc"]', '--freeze "layer1.*" --freeze fc'),
    ('optimizer.name="sgd"', "--optimizer sgd"),
    ('distill.teacher="start"', "--distill start"),
    ("leave data.image_size= out", "leave --image-size out"),
    ("seed=3", "--seed 3"),
    ("resume=True", "--resume"),
    ("another output=", "another -o"),
    ("engine.checkpointing=True", "--set engine.checkpointing=true"),
    ("engine.compile=False.", "--set engine.compile=false."),
    ("augment.flip=0.25", "--set augment.flip=0.25"),
    ("augment.crop=[0.35, 1.0]", '--set "augment.crop=[0.35, 1.0]"'),
    ('distill.features=["a", "b"]', '--set \'distill.features=["a", "b"]\''),
    ('data.val="test"', "--set data.val=test"),
    ('data.val="3"', "--set data.val=3"),
    ('data.val="a b"', '--set "data.val=a b"'),
    ('data.val="true"', "--set 'data.val=\"true\"'"),
    ("data.label=COLUMN", "--set data.label=COLUMN"),
    ("data.label=", "--set data.label=..."),
    ("to_toml(TrainingOptions()) prints them all", "condconv finetune --print-recipe prints them all"),
]
UNCHANGED = [
    "",
    "schedule.epochs is 0. It must be a whole number, at least 1.",
    "kernel_size=3, stride=2 and groups=4 are no options",
    "convert(model, CondConv(experts=2), include=['a(b)'], classifier=True) in Python",
    "report(model, inputs=...)",
    "/data/seed=3/model.pt cannot be read",
    "./seed=3.pt and 'seed=3' and \"arch=x\" and --seed=3 and a?seed=3&arch=4",
    "seed == 3, seed => 3, seed = 3, reseed=3",
    "weights=<class 'dict'>, weights=$HOME, include=[unclosed, include='unclosed",
    "weights=ResNet18_Weights.from_file(x)",
    "data.unknown=3, nothing.seed=4, self.seed=3",
    "an open ( bracket, f(an open call",
]


@pytest.mark.parametrize(("text", "expected"), CONVERT)
def test_arguments_of_convert(text: str, expected: str) -> None:
    assert to_flags(text, COMMANDS["convert"]) == expected


@pytest.mark.parametrize(("text", "expected"), FINETUNE)
def test_options_of_a_run(text: str, expected: str) -> None:
    assert to_flags(text, COMMANDS["finetune"]) == expected


@pytest.mark.parametrize("text", UNCHANGED)
@pytest.mark.parametrize("command", COMMANDS)
def test_other_text_stays(text: str, command: str) -> None:
    assert to_flags(text, COMMANDS[command]) == text


@pytest.mark.parametrize(
    ("command", "text", "expected"),
    [
        ("report", "data=FOLDER", "--data FOLDER"),
        ("report", "data.folder=FOLDER", "--data FOLDER"),
        ("report", "data.workers=0", "data.workers=0"),
        ("report", 'original="a.pt", latency=True', "--original a.pt --latency"),
        ("report", 'include=["a"]', 'include=["a"]'),
        ("import", "num_classes=3", "--num-classes 3"),
        ("import", "file=", "FILE"),
        ("export", 'layout="timm"', "--layout timm"),
        ("export", 'trust=["timm"]', "--trust timm"),
        ("export", "num_classes=3", "num_classes=3"),
    ],
)
def test_a_command_knows_its_own_flags_alone(command: str, text: str, expected: str) -> None:
    assert to_flags(text, COMMANDS[command]) == expected


def test_every_command_translates() -> None:
    assert all(isinstance(command, TranslatingCommand) for command in COMMANDS.values())


def test_an_error_keeps_its_class_and_its_three_parts() -> None:
    app = typer.Typer()

    @app.command(cls=TranslatingCommand)
    def fail(skip_stem: bool = True) -> None:
        raise InputError("skip_stem=False.", "skip_stem=True is allowed.", "skip_stem=True")

    error = CliRunner().invoke(app, []).exception
    assert isinstance(error, InputError)
    assert (error.given, error.allowed, error.fix) == ("--no-skip-stem.", "--skip-stem is allowed.", "--skip-stem")
    assert isinstance(error.__cause__, SurgeryError)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "augment.flip=2"], "Try: --set augment.flip=0.5"),
        (["--set", "distill.features=3"], "Try: --set 'distill.features=[\"NAME\"]'"),
        (["--batch-size", 0], "Try: --batch-size 32"),
        (["--set", "optimizer.lrr=3"], "Try: condconv finetune --print-recipe prints them all"),
        (["--set", "lr"], "'lr' is not an option.\n  It must be SECTION.NAME=VALUE.\n  Try: --lr 0.001"),
        (["--image-size", "2"], "Try: leave --image-size out"),
    ],
)
def test_finetune_prints_flags(condconv: Run, arguments: list[object], words: str) -> None:
    code, out, err = condconv("finetune", "m.pt", "--data", "nowhere", *arguments)
    assert (code, out) == (2, "")
    assert words in err
