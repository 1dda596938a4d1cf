"""Mistakes on the command line and in files: each is refused with one message that names what was wrong."""

import pytest

from deedsr.errors import UsageError
from jobs import cli

L = ["train", "learner", "--data", "d", "--out", "o"]
A = ["train", "adapter", "--data", "d", "--learner", "l", "--out", "o"]
S = ["shards", "--source", "a", "--out", "b"]
U = ["upscale", "a", "--out", "b"]

TYPED = [
    ([*L, "--train.lrr", "1"], "unknown option --train.lrr = 1; did you mean --train.lr?"),
    ([*L, "--train.lr", "fast"], "--train.lr takes a number >0, got 'fast'"),
    ([*L, "--train.lr"], "--train.lr needs a value: a number >0"),
    ([*L, "--train.lr="], "--train.lr takes a number >0, got ''"),
    ([*L, "--train.max_steps", "1.5"], "--train.max_steps takes a whole number >0, got '1.5'"),
    ([*L, "--train.max_steps=1e3"], "--train.max_steps takes a whole number >0, got '1e3'"),
    ([*L, "--train.max-step", "3"], "unknown option --train.max_step = 3; did you mean --train.max_steps?"),
    ([*L, "--max-steps", "3"], "unknown option --max-steps = 3; did you mean --train.max_steps?"),
    ([*L, "--train", "3"], "--train is a group; set its members, such as --train.lr or --train.schedule"),
    ([*L, "--train.zero_stage", "4"], "--train.zero_stage takes 0 or 1 or 2 or 3, got '4'"),
    ([*L, "--train.precision", "fp16"], "--train.precision takes fp32 or bf16, got 'fp16'"),
    ([*L, "--train.exact_sums", "maybe"], "unexpected argument 'maybe'"),
    ([*L, "--train.exact_sums=1.0"], "--train.exact_sums takes true or false or null, got '1.0'"),
    ([*L, "--train.seed", "true"], "--train.seed takes a whole number, got 'true'"),
    ([*L, "--train.schedule_steps", "ten"], "--train.schedule_steps takes a whole number or null, got 'ten'"),
    ([*L, "--model.statistics", "a"], "--model.statistics takes a whole number >0 or null, got 'a'"),
    ([*L, "--model.statistics", "[4,b]"], "--model.statistics takes a whole number >0 or null, got 'b'"),
    ([*L, "--preset", "huge"], "--preset takes paper or fast or tiny, got 'huge'"),
    ([*L, "--preset"], "--preset needs a value: paper or fast or tiny"),
    ([*L, "extra"], "unexpected argument 'extra'"),
    ([*L, "--config"], "--config needs a value"),
    ([*A, "--model.ablate", "vectr"], "--model.ablate takes vector or global or local or da, got 'vectr'"),
    ([*A, "--sampling", "3"], "--sampling takes a mapping, got '3'"),
    ([*S, "--workers", "0"], "--workers takes a whole number >0 or null, got '0'"),
    ([*S, "--workers", "two"], "--workers takes a whole number >0 or null, got 'two'"),
    ([*S, "--nodes", "null"], "--nodes takes a whole number >0, got 'null'"),
    ([*S, "--price", "-1"], "--price takes a number ≥0 or null, got '-1'"),
    ([*S, "--recipe"], "--recipe needs a value: text or a mapping"),
    ([*S, "--plann"], "unknown option --plann; did you mean --plan?"),
    ([*S, "-x"], "unexpected argument '-x'"),
    ([*U, "--color-fix", "ada"], "--color-fix takes none or adain or wavelet or null, got 'ada'"),
    ([*U, "--noise-guidance", "1.5"], "--noise-guidance takes a number ≥0 and ≤1 or null, got '1.5'"),
    ([*U, "--restoration", "half"], "--restoration takes a number ≥0 and ≤1 or null, got 'half'"),
    ([*U, "--input", "b"], "unexpected argument 'a'"),
    ([*U, "--ray", "yes"], "unexpected argument 'yes'"),
    ([*U, "--help-me"], "unknown option --help-me; did you mean --help?"),
    (["upscale", "--out", "b"], "missing INPUT (files, folders, URIs or patterns such as 's3://bucket/a/*.jpg')"),
    (
        ["upscale"],
        "missing INPUT (files, folders, URIs or patterns such as 's3://bucket/a/*.jpg'), --out (output: folder or s3://bucket/prefix)",
    ),
    (["verify", "a", "b"], "unexpected argument 'b'"),
    (["verify", "a", "--replay", "-1"], "--replay takes a whole number ≥0, got '-1'"),
    (
        ["evaluate", "--model", "tiny", "--data", "d", "--out", "o", "--split", "test"],
        "--split takes validation or train, got 'test'",
    ),
    (["demo", "--json=maybe"], "--json takes no value"),
    (["demo", "--json", "x"], "unexpected argument 'x'"),
]

IN_A_FILE = [
    ([*L], "train: {lr: fast}", "--train.lr (in c.yaml) takes a number >0, got 'fast'"),
    ([*L], "train: {lrr: 1}", "unknown option --train.lrr (in c.yaml) = 1; did you mean --train.lr?"),
    ([*L], "train: 3", "--train (in c.yaml) is a group; set its members, such as --train.lr or --train.schedule"),
    ([*L], "train: {seed: true}", "--train.seed (in c.yaml) takes a whole number, got 'true'"),
    ([*L], "train: {max_steps: [1, 2]}", "--train.max_steps (in c.yaml) takes a whole number >0, got '[1, 2]'"),
    ([*L], "preset: huge", "--preset (in c.yaml) takes paper or fast or tiny, got 'huge'"),
    ([*L], "experiment: {a: 1}", "--experiment (in c.yaml) takes text, got \"{'a': 1}\""),
    ([*L], "json: true", "--json (in c.yaml) is for the command line only"),
    ([*L], "config: d.yaml", "--config (in c.yaml) is for the command line only"),
    ([*L], "train: {lr: null}", "--train.lr (in c.yaml) takes a number >0, got 'null'"),
    ([*A], "model: {ablate: [vectr]}", "--model.ablate (in c.yaml) takes vector or global or local or da, got 'vectr'"),
    ([*A], "model: {ablate: vector, tokens: 3}", "--model.tokens (in c.yaml) takes new_kv or project, got '3'"),
]


@pytest.mark.parametrize(("words", "message"), TYPED)
def test_a_mistake_on_the_command_line_is_named(words, message):
    assert refusal(words) == message


@pytest.mark.parametrize(("words", "content", "message"), IN_A_FILE)
def test_a_mistake_in_a_file_is_named_with_the_file(words, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(content)
    assert refusal([*words, "--config", "c.yaml"]) == message


def refusal(words: list[str]) -> str:
    length = 2 if words[0] == "train" else 1
    _, parser = cli.load(" ".join(words[:length]))
    with pytest.raises(UsageError) as error:
        parser.read(words[length:])
    message, see = str(error.value).splitlines()
    assert see == f"see: deedsr {' '.join(words[:length])} --help"
    return message
