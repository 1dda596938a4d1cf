"""The command line: what it accepts, how it refuses, what it prints where."""

import dataclasses
import json
import re
import subprocess
import sys
from importlib.metadata import version
from typing import Annotated, Literal

import pytest
import yaml

from deedsr.errors import DeeDSRError, UsageError
from jobs import cli
from jobs.command import Command, Outcome
from jobs.job_file import load_job_files
from jobs.options import CommandParser, leaves

COMMANDS = list(cli.COMMANDS)


def run(capsys, *words: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command in this process."""
    code = cli.main(list(words))
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def refused(capsys, *words: str) -> str:
    """The one message of a command that was wrong, without the line that points to --help."""
    code, output, log = run(capsys, *words)
    assert (code, output) == (2, "")
    assert log.startswith("error: ")
    message, *rest = log.strip().splitlines()
    assert [line.startswith("see: deedsr ") for line in rest] in ([], [True])
    return message


@dataclasses.dataclass
class Inner:
    rate: Annotated[float, "peak"] = 0.5
    level: Annotated[Literal[1, 2], "how deep"] = 1


@dataclasses.dataclass
class Outer:
    place: Annotated[list[str], "where from"]
    out: Annotated[str, "where to"]
    switch: Annotated[bool, "on or off"] = False
    two_words: Annotated[int | None, "any number"] = None
    inner: Inner = dataclasses.field(default_factory=Inner)


def parser() -> CommandParser:
    presets = {"small": {"inner": {"rate": 0.1}}, "large": {"inner": {"rate": 0.9, "level": 2}}}
    return CommandParser("try", Command(Outer, Outcome, "", operand="place", presets=presets))


# --- options -----------------------------------------------------------------------------------------------------


def test_what_is_typed_wins_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("preset: large\nplace: [x, y]\nout: file\ninner: {rate: 1e-3}\ntwo_words: 7\n")
    assert parser().read(["a", "--out", "o"]).options == Outer(["a"], "o", inner=Inner(0.1, 1))
    assert parser().read(["a", "--out", "o", "--preset", "large"]).options.inner == Inner(0.9, 2)
    from_file = parser().read(["--config", str(file)]).options
    assert from_file == Outer(["x", "y"], "file", two_words=7, inner=Inner(0.001, 2))
    # In any order.
    typed = ["b", "--out", "o", "--inner.rate", "2", "--two-words=null"]
    for words in ([*typed, "--config", str(file)], ["--config", str(file), *typed[1:], "--place", "b"]):
        assert parser().read(words).options == Outer(["b"], "o", two_words=None, inner=Inner(2.0, 2))


def test_dashes_underscores_switches_and_repetition_mean_what_they_look_like():
    options = parser().read(["--place", "a", "b", "--place=c", "--out=o", "--two_words", "3", "--switch"]).options
    assert options == Outer(["a", "b", "c"], "o", switch=True, two_words=3, inner=Inner(0.1, 1))
    assert parser().read(["a", "--switch", "--out", "o", "--two-words", "-3"]).options.two_words == -3
    assert parser().read(["a", "--switch", "false", "--out", "o"]).options.switch is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--inner.rat", "1"], "unknown option --inner.rat = 1; did you mean --inner.rate?"),
        (["--rate", "1"], "unknown option --rate = 1; did you mean --inner.rate?"),
        (["--two-word=1"], "unknown option --two-word = 1; did you mean --two-words?"),
        (["--inner", "1"], "--inner is a group; set its members, such as --inner.rate or --inner.level"),
        (["--inner.rate", "fast"], "--inner.rate takes a number, got 'fast'"),
        (["--inner.level=3"], "--inner.level takes 1 or 2, got '3'"),
        (["--two-words", "1.5"], "--two-words takes a whole number or null, got '1.5'"),
        (["--switch=7"], "--switch takes true or false, got '7'"),
        (["--preset", "huge"], "--preset takes small or large, got 'huge'"),
        (["--inner.rate"], "--inner.rate needs a value: a number"),
        (["a", "--place", "b", "--out", "o"], "unexpected argument 'a'"),
        (["a"], "missing --out (where to)"),
        (["--out", "o"], "missing PLACE (where from)"),
    ],
)
def test_a_wrong_option_is_named_with_its_value_and_what_is_accepted(words, message):
    with pytest.raises(UsageError) as error:
        parser().read(words)
    assert str(error.value) == f"{message}\nsee: deedsr try --help"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("inner: {rat: 1}", "unknown option --inner.rat (in FILE) = 1; did you mean --inner.rate?"),
        ("inner: {rate: fast}", "--inner.rate (in FILE) takes a number, got 'fast'"),
        ("inner: 3", "--inner (in FILE) is a group; set its members, such as --inner.rate or --inner.level"),
        ("- a", "FILE must hold a mapping of options such as `train: {lr: 1e-4}`, got ['a']"),
        ("", "FILE must hold a mapping of options such as `train: {lr: 1e-4}`, got None"),
        ("a: [", "FILE is no YAML file: "),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path, content, message):
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(UsageError) as error:
        parser().read(["a", "--out", "o", "--config", str(file)])
    assert str(error.value).startswith(message.replace("FILE", str(file)))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_may_begin_with_a_byte_order_mark(tmp_path, encoding):
    (tmp_path / "c.yaml").write_text("inner: {rate: 3}", encoding)
    assert parser().read(["a", "--out", "o", "--config", str(tmp_path / "c.yaml")]).options.inner.rate == 3


# --- commands ----------------------------------------------------------------------------------------------------


def test_deedsr_alone_lists_every_command(capsys):
    code, output, _ = run(capsys)
    assert code == 0
    for name, (_, summary) in cli.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", output, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_each_command_and_each_of_its_options_does(capsys, name):
    code, output, log = run(capsys, *name.split(), "--help")
    assert (code, log) == (0, "")
    command, _ = cli.load(name)
    assert f"example:\n  deedsr {name} " in output
    for option in leaves(command.options):
        assert f"{option.flag} " in output
        assert option.help in " ".join(output.split())
        assert option.help, option.key


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_in_the_help_are_valid_commands(name):
    command, reader = cli.load(name)
    for line in command.example.splitlines():
        reader.read(line.strip().removeprefix(f"deedsr {name}").split())


def test_reading_options_and_help_import_nothing_heavy():
    heavy = "{'torch', 'diffusers', 'ray', 'mlflow', 'deepspeed', 'boto3', 'cv2', 'pyarrow'}"
    code = (
        f"import sys; from jobs import cli; [cli.load(name) for name in {COMMANDS}]; print({heavy} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["shrds"], "error: unknown command 'shrds'; did you mean `deedsr shards`?"),
        (["train"], "error: `deedsr train` needs one of: train learner, train adapter"),
        (["shards", "--source", "a"], "error: missing --out (the dataset: folder or s3://bucket/prefix)"),
        (
            ["shards", "--source", "a", "--out", "b", "--workers", "0"],
            "error: --workers takes a whole number >0 or null, got '0'",
        ),
        (
            ["train", "learner", "--data", "a", "--out", "b", "--train.lrr", "1"],
            "error: unknown option --train.lrr = 1; ",
        ),
        (
            ["upscale", "a", "--out", "b", "--color-fix", "ada"],
            "error: --color-fix takes none or adain or wavelet or null, got ",
        ),
        (["shards", "--source", "a", "--out", "b", "--price", "2"], "error: --price 2.0 has no effect without --plan"),
        (
            ["shards", "--join", "a", "--out", "b", "--recipe", "light"],
            "error: --recipe light has no effect with --join",
        ),
        (["demo", "--out", "s3://bucket/demo"], "error: the demo runs on this machine alone: --out takes a folder"),
        (["shards", "--source", "a", "--out", "b", "--plan", "--gc"], "error: --gc True has no effect with --plan"),
        (["verify", "a", "--config", "nowhere.yaml"], "error: cannot read the configuration file nowhere.yaml: "),
        (["submit", "nowhere.yaml"], "error: cannot read the configuration file nowhere.yaml: "),
    ],
)
def test_a_wrong_command_is_exit_2_with_one_message(capsys, words, message):
    assert refused(capsys, *words).startswith(message)


# --- bad input: one clear error that names the thing, nothing half-written -----------------------------------------


def shards(*words: str) -> list[str]:
    return ["shards", "--tracking", "false", *words]


def test_an_empty_source_folder_is_named(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    assert str(tmp_path / "empty") in refused(capsys, *shards("--source", str(tmp_path / "empty"), "--out", str(out)))
    assert not out.exists()


def test_a_missing_source_folder_is_named(capsys, tmp_path):
    assert "nowhere" in refused(capsys, *shards("--source", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")))


def test_an_unknown_recipe_and_a_wrong_key_of_a_recipe_are_named(capsys, tmp_path, photos):
    words = shards("--source", str(photos), "--out", str(tmp_path / "out"))
    assert "heavvy" in refused(capsys, *words, "--recipe", "heavvy")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("base: light\nvarants: 3\n")
    assert "varants" in refused(capsys, *words, "--recipe", str(recipe))


def test_a_dataset_without_manifest_is_not_read(capsys, tmp_path):
    (tmp_path / "train-000000-0123456789ab.tar").write_bytes(b"")
    code, _, log = run(capsys, "verify", str(tmp_path))
    assert code == 1
    assert f"{tmp_path} has no manifest.json" in log
    assert "run the same `deedsr shards` command again" in log


def test_a_bucket_that_does_not_exist_is_named(capsys, s3_server):
    assert "no-such-bucket" in refused(capsys, "verify", "s3://no-such-bucket/shards")


def test_missing_credentials_are_named(capsys, s3_server, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert "credentials" in refused(capsys, "verify", "s3://some-bucket/shards")


def test_training_on_what_is_no_dataset_says_so(capsys, tmp_path):
    words = ["train", "learner", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--preset", "tiny"]
    code, output, log = run(capsys, *words)
    assert (code, output) == (1, "")
    assert "has no manifest.json" in log
    assert not (tmp_path / "out").exists()


def test_impossible_training_options_are_named(capsys, tmp_path):
    words = ["train", "learner", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert "train.num_workers" in refused(capsys, *words, "--train.num_workers", "4..1")
    assert "train.lr" in refused(capsys, *words, "--train.lr", "-1")


# --- results and failures ------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch):
    """Puts a command in the place of `verify`."""

    @dataclasses.dataclass
    class NoOptions:
        pass

    def install(work) -> None:
        module = type("module", (), {"COMMAND": Command(NoOptions, lambda options: work(), example="")})
        monkeypatch.setitem(sys.modules, "jobs.verify", module)

    return install


def test_what_is_printed_after_the_result_goes_to_stderr():
    """Ray prints what workers of a cluster wrote until this process ends."""
    late = "import atexit, sys, deedsr.__main__; atexit.register(print, 'late'); sys.argv[1:] = ['--version']"
    done = subprocess.run([sys.executable, "-c", f"{late}; deedsr.__main__.main()"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{version('deedsr')}\n", "late\n")


def test_stdout_holds_the_result_alone_readable_or_as_one_json_line(capsys, command):
    def work():
        print("noise")
        return Outcome({"ok": True, "problems": [], "loss": float("nan"), "samples_per_second": 1.23456})

    command(work)
    code, output, log = run(capsys, "verify", "--json")
    assert (code, log) == (0, "noise\n")
    assert output == '{"ok": true, "problems": [], "loss": null, "samples_per_second": 1.23456}\n'
    assert run(capsys, "verify")[1].splitlines()[1::2] == ["problems            none", "samples per second  1.235"]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DeeDSRError("the work failed"), 1, "error: the work failed\n"),
        (UsageError("the command is wrong"), 2, "error: the command is wrong\n"),
        (PermissionError(13, "Permission denied", "/x"), 1, "error: Permission denied: /x\n"),
        (KeyboardInterrupt(), 130, "interrupted; the same command continues where it stopped\n"),
        (ZeroDivisionError("a\nb"), 1, "internal error: ZeroDivisionError: a; set DEEDSR_DEBUG=1 for the traceback\n"),
    ],
)
def test_exit_codes_and_messages_of_failures(capsys, command, error, code, message):
    def work():
        raise error

    command(work)
    assert run(capsys, "verify", "--json") == (code, "", message)


def test_work_that_failed_in_part_is_exit_1_and_still_has_its_result(capsys, command):
    command(lambda: Outcome({"failed": ["a.jpg"]}, complete=False))
    code, output, _ = run(capsys, "verify", "--json")
    assert (code, json.loads(output)) == (1, {"failed": ["a.jpg"]})


def test_an_error_inside_a_ray_task_reads_like_one_outside(capsys, command, ray_cluster):
    import ray

    @ray.remote(max_retries=0)
    def fail():
        raise UsageError("the bucket b does not exist: create it")

    command(lambda: ray.get(fail.remote()))
    assert run(capsys, "verify") == (2, "", "error: the bucket b does not exist: create it\n")


def test_debugging_shows_the_traceback(capsys, command, monkeypatch):
    monkeypatch.setenv("DEEDSR_DEBUG", "1")
    command(lambda: 1 / 0)
    assert cli.main(["verify"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_the_module_is_the_command(tmp_path):
    done = subprocess.run([sys.executable, "-m", "deedsr", "verify"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: missing URI")


# --- job files -----------------------------------------------------------------------------------------------------

JOB = {"command": "shards", "options": {"source": ["s3://b/photos"], "out": "s3://b/shards"}, "mlflow": "nodes"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"comand": "x"}, "unknown key comand; did you mean command?"),
        ({"command": "shrads"}, "command must be one of shards, verify"),
        ({"command": "submit"}, "command must be one of shards, verify"),
        ({"entrypoint_num_gpus": -1}, "entrypoint_num_gpus: input should be greater than or equal to 0, got -1"),
        (
            {"options": {"sorce": ["a"], "out": "s3://b/o"}},
            "options: unknown option --sorce = a; did you mean --source?",
        ),
        (
            {"options": {"source": ["s3://b/p"], "out": "shards"}},
            "options.out is 'shards', relative to a working directory",
        ),
        ({"working_dir": "nowhere"}, "nowhere is not a folder"),
        (
            {"runtime_env": {"env_vars": {"AWS_SECRET_ACCESS_KEY": "x"}}},
            "AWS_SECRET_ACCESS_KEY looks like a credential",
        ),
        ({"runtime_env": {"env_vars": {"STORE": "http://me:pw@host"}}}, "STORE looks like a credential"),
    ],
)
def test_a_wrong_job_file_is_refused_with_its_name_and_key(tmp_path, changes, message):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(JOB | changes))
    with pytest.raises(UsageError) as error:
        load_job_files(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "pw@host" not in str(error.value)


def test_a_job_file_becomes_the_command_that_one_would_type(tmp_path):
    path = tmp_path / "job.yaml"
    options = {"preset": "tiny", "data": "s3://b/my shards", "out": "s3://b/o", "train": {"lr": 1e-4, "num_workers": 2}}
    job = {"command": "train learner", "options": options, "mlflow": "nodes"}
    path.write_text(yaml.safe_dump(job, sort_keys=False))
    assert load_job_files(path)[0].entrypoint == (
        "python -m deedsr train learner --preset=tiny '--data=s3://b/my shards' --out=s3://b/o "
        "--train.lr=0.0001 --train.num_workers=2"
    )
