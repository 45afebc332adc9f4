"""The command line: commands, help that is quick, results on stdout, refusals in one line with
status 2.
"""

import json
import re
import subprocess
import sys

import pytest
import tiny_recipe
from corpus_layouts import split_path
from typer.testing import CliRunner

import fastlm.cli
from fastlm.cli import app
from fastlm.errors import InputError
from fastlm.pipeline.events import View
from fastlm.stages import run_recipe

VERBS = (
    "info",
    "tasks",
    "run",
    "runs",
    "pretrain",
    "sft",
    "distill",
    "reward",
    "dpo",
    "ppo",
    "grpo",
    "quantize",
    "judge",
    "label",
    "export",
    "eval",
    "safety",
    "generate",
    "chat",
    "merge",
    "tokenizer",
    "data",
    "rank",
    "serve",
    "promote",
    "promotion",
    "rollback",
    "feedback",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    recipe = tiny_recipe.write(folder)
    run_recipe(recipe, folder / "run")
    return folder / "run"


def call(*arguments, status=0, **kwargs):
    result = CliRunner().invoke(app, [str(a) for a in arguments], **kwargs)
    assert result.exit_code == status, (result.output, result.exception)
    return result


def refused(*arguments, text, **kwargs):
    result = call(*arguments, status=2, **kwargs)
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("fastlm: ") and text in line


def test_help_lists_the_commands_without_torch():
    code = (
        "import sys; from fastlm.cli import main; sys.argv = ['fastlm', *sys.argv[1:]]\n"
        "try: main()\nexcept SystemExit: pass\n"
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    )
    for arguments in (["--help"], ["pretrain", "--help"], ["sft", "--help"], ["data", "--help"]):
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, *arguments], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "Usage: fastlm" in done.stdout
    output = call("--help").stdout
    assert all(f"  {verb} " in output for verb in VERBS)


def test_version():
    assert call("--version").stdout.split() == ["fastlm", fastlm.__version__]


def test_info(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    have = json.loads(call("info", "--json").stdout)
    assert have["ops"]["rms_norm"]["backend"]
    text = call("info").stdout
    assert "torch" in text and all(f" {op} " in text for op in have["ops"])  # untruncated
    monkeypatch.setenv("COLUMNS", "120")
    text = call("info").stdout
    reasons = [reason for reason in have["backends"].values() if reason]
    assert all(
        text.count(reason) <= reasons.count(reason) for reason in reasons
    )  # not repeated for each op
    assert "tensors" not in text and re.search(r"rms_norm  .*✓", text)


def test_generate_repeats_with_a_seed_and_streams(finished):
    options = ["generate", "--model", finished, "--prompt", "The tree", "--max-new-tokens", 12]
    first = call(*options, "--seed", 5).stdout
    assert first == call(*options, "--seed", 5).stdout
    assert first != call(*options, "--seed", 6).stdout
    greedy = call(*options, "--temperature", 0).stdout
    assert greedy == call(*options, "--temperature", 0, "--raw", "--seed", 1).stdout
    call("generate", "--model", finished / "quantize", "--prompt", "The", "--max-new-tokens", 3)


def test_generate_has_every_way_to_choose_a_token(finished):
    options = ["generate", "-m", finished, "-p", "The tree", "--max-new-tokens", 20]
    greedy = call(*options, "--temperature", 0).stdout.rstrip("\n")
    assert len(greedy) > 3
    half = greedy[len(greedy) // 2 :][:2]
    stopped = call(*options, "--temperature", 0, "--stop", "never", "--stop", half).stdout
    assert stopped.rstrip("\n") == greedy[: greedy.index(half)]
    other = call(*options, "--temperature", 0, "--repetition-penalty", 1.5).stdout
    assert other.rstrip("\n") != greedy
    assert call(*options, "--min-p", 1.0, "--seed", 3).stdout.rstrip("\n") == greedy
    refused(*options, "--min-p", 2, text="min_p: expected in [0, 1]")
    refused(*options, "--stop", "", text="stop: expected strings of at least one character")


def test_generate_reads_prompts_from_options_stdin_and_files(finished, tmp_path):
    options = ["generate", "-m", finished, "--max-new-tokens", 5, "--temperature", 0]
    (tmp_path / "p").write_text("The river\n")
    separate = [call(*options, "-p", p).stdout.rstrip("\n") for p in ("The tree", "A", "The river")]
    prompts = ["-p", "The tree", "--prompt", "-", "--prompt-file", tmp_path / "p"]
    together = call(*options, *prompts, input="A\n").stdout
    assert together == "\n\n".join(separate) + "\n"
    have = json.loads(call(*options, *prompts, "--json", input="A").stdout)
    assert [r["text"] for r in have["results"]] == separate
    assert [r["prompt"] for r in have["results"]] == ["The tree", "A", "The river"]
    assert {r["finish_reason"] for r in have["results"]} <= {"length", "stop"}
    stats = have["stats"]
    assert stats["prompt_tokens"] == sum(r["prompt_tokens"] for r in have["results"])
    assert stats["new_tokens"] == sum(r["new_tokens"] for r in have["results"])
    assert stats["seconds_to_first_token"] > 0 and stats["decode_tokens_per_second"] > 0
    refused(*options, text="prompt: expected --prompt TEXT (- for stdin) or --prompt-file FILE")
    refused(*options, "-p", "-", "-p", "-", text="prompt: expected - once")
    (tmp_path / "q").write_bytes(b"\xff")
    refused(*options, "--prompt-file", tmp_path / "q", text="expected UTF-8 text")
    refused(*options, "--prompt-file", tmp_path / "none", text="none")


def test_generate_prints_its_speed_and_that_the_context_is_full(finished):
    options = ["generate", "-m", finished, "-p", "The tree", "--max-new-tokens"]
    output = call(*options, 5, "--stats").stderr
    assert re.fullmatch(
        r"prompt \d tokens, [\d.]+ s to the first token \([\d,]+ tokens/s\);"
        r" 5 new, [\d,]+ tokens/s\n", output,
    )  # fmt: skip
    assert call(*options, 5).stderr == ""  # no terminal
    full = call(*options, 99, "--temperature", 0).stderr
    assert full == "the model's context of 32 tokens is full: the text ends there\n"


def test_a_refused_value_is_named_with_its_option():
    refused("generate", "-m", "x", "-p", "a", "--max-new-tokens", "many",
            text="--max-new-tokens: expected a valid integer, got 'many'")  # fmt: skip
    refused("generate", "-m", "x", "-p", "a", "--max-new-tokens", 0,
            text="max_new_tokens: expected 1 or more, got 0")  # fmt: skip


def test_generate_refuses_a_prompt_beyond_the_context(finished):
    refused("generate", "--model", finished, "--prompt", "x " * 40, text="32 tokens of context")


def test_chat_answers_with_a_chat_model(finished, tmp_path):
    from fastlm.tokenizer.tokenizer import Tokenizer

    refused("chat", "--model", finished, text="no chat template")
    import shutil

    shutil.copytree(finished / "pretrain/model", tmp_path / "chat")
    tool = Tokenizer.load(finished / "tokenizer")
    tool.chat_template = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    tool.save(tmp_path / "chat")
    options = ["--max-new-tokens", 4, "--seed", 1]
    output = call(
        "chat", "--model", tmp_path / "chat", *options, input="The tree\nThe river sees\n\n"
    ).stdout
    assert output.count("\n") >= 2


def test_a_conversation_forgets_its_oldest_turns(finished, tmp_path):
    import shutil

    from fastlm.serve.chat_session import ChatSession
    from fastlm.serve.text_generator import TextGenerator

    shutil.copytree(finished / "pretrain/model", tmp_path / "chat")
    generator = TextGenerator(tmp_path / "chat")
    generator.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    session = ChatSession(generator, system="S", max_new_tokens=4)
    pieces: list[str] = []
    for _ in range(6):
        answer = session.reply("The tree sees", pieces.append, seed=0)
    assert len(session.turns) < 12 and session.turns[0]["role"] == "user"
    assert "".join(pieces).endswith(answer.text)

    before = session.turns

    def interrupt(piece):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # the part of the answer already written is kept
        session.reply("The tree sees", interrupt, seed=0)
    assert session.turns[-1]["content"] and session.turns[-2]["content"] == "The tree sees"
    assert answer.text.startswith(session.turns[-1]["content"]) and session.turns != before
    session.reset()
    assert session.turns == []
    with pytest.raises(InputError, match=r"lone surrogate at 4$"):  # in the typed text
        session.reply("hey \ud800", pieces.append)


def test_eval_of_shards_and_of_text(finished, tmp_path):
    options = ["eval", "-m", finished, "--data"]
    shards, text = (
        json.loads(call(*options, finished / data, "--json").stdout)
        for data in ("shards/heldout", split_path(finished / "data", "heldout"))
    )
    (of_shards,), (of_text,) = shards["models"].values(), text["models"].values()
    assert of_text["bits_per_byte"] == pytest.approx(of_shards["bits_per_byte"], rel=1e-6)
    assert text["bits_per_byte_xz"] > 0 and "bits_per_byte_xz" not in shards
    # in a run both folders contain the held-out part
    for data in ("shards", "data"):
        folder = json.loads(call(*options, finished / data, "--json").stdout)
        (same,) = folder["models"].values()
        assert same["bits_per_byte"] == pytest.approx(of_shards["bits_per_byte"], rel=1e-6)
    output = call(*options, finished / "shards/heldout", "-o", tmp_path / "scores").stdout
    assert re.search(r"^\S+ +\d\.\d{4} +\+0\.0 %", output, re.M)
    assert json.loads((tmp_path / "scores/scores.json").read_text())["models"]
    two = call(*options, finished / "data", "-m", finished / "quantize").stdout
    assert "bits per byte" in two and "xz -9e" in two
    refused("eval", "-m", finished, "--data", tmp_path / "none", text="none")


def test_quantize_prints_the_change(finished, tmp_path):
    data = ["--data", finished / "shards/heldout"]
    output = call(
        "quantize",
        "-m",
        finished,
        "-o",
        tmp_path / "q",
        "--format",
        "w8a16",
        "--group-size",
        16,
        *data,
    ).stdout
    assert "held-out bits per byte: " in output and "%)" in output
    assert (tmp_path / "q/tokenizer.json").exists()
    call("generate", "-m", tmp_path / "q", "-p", "The", "--max-new-tokens", 2)
    refused(
        "quantize",
        "-m",
        finished,
        "-o",
        tmp_path / "r",
        "--format",
        "w3a16",
        text="format: expected one of w4a16",
    )
    assert not (tmp_path / "r").exists()


def test_pretrain_goes_on_where_it_was(finished, tmp_path):
    options = [
        "pretrain", "--shards", finished / "shards",
        "--config", finished / "pretrain/model/config.json", "--out", tmp_path / "p",
        "--batch-size", 2, "--seq-len", 16, "--save-steps", 2,
    ]  # fmt: skip
    words = ["--tokenizer", finished / "tokenizer"]
    result = call(*options, "--max-tokens", 4 * 2 * 16, *words)
    assert re.fullmatch(r"4 steps, loss \d\.\d{4}, [\d,]+ tokens/s: .*\n", result.stdout)
    assert re.search(r"^step 2: held-out loss .* bits per byte$", result.stderr, re.M)
    assert (tmp_path / "p/model/config.json").exists()
    call("generate", "-m", tmp_path / "p", "-p", "The", "--max-new-tokens", 2)
    assert call(*options, "--max-tokens", 6 * 2 * 16).stdout.startswith("6 steps, loss ")
    refused(*options, "--max-tokens", 192, "--lr", 0.5, text="lr was 0.001, now 0.5")
    refused(*options, text="max_tokens, max_steps, max_seconds: expected at least one of them")


def test_the_time_left_follows_the_pace_of_late(capsys):
    """It does not follow the whole run, which may have been suspended or resumed."""
    show = View()
    for seconds, progress in ((1000, 0.1), (1010, 0.2), (1020, 0.3)):
        show({"loss": 4.0, "lr": 3e-3, "tokens_per_second": 900.0, "seconds": seconds,
              "progress": progress, "step": 1})  # fmt: skip
        if progress != 0.2:
            show({"step": 1, "val_loss": 4.5, "bits_per_byte": 2.0})
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("training loss 4, lr 0.003, 900 tokens/s, 1 min 10 s left")


def test_pretrain_logs_at_steady_steps(finished, tmp_path):
    output = call(
        "pretrain", "--shards", finished / "shards", "--config",
        finished / "pretrain/model/config.json", "--out", tmp_path / "p", "--batch-size", 2,
        "--seq-len", 16, "--max-steps", 9, "--log-every", 4,
    ).stderr  # fmt: skip
    lines = re.findall(
        r"^step (\d+): training loss \d\.\d{1,3}, lr [\d.e-]{4,8}, [\d,]+ tokens/s, [\d.]+ s left$",
        output, re.M,
    )  # fmt: skip
    assert lines == ["4", "8"]
    assert re.search(r"^step 9: held-out loss \d\.\d{4}, \d\.\d{4} bits per byte$", output, re.M)


def test_tokenizer_train_and_encode(finished, tmp_path):
    call(
        "tokenizer",
        "train",
        split_path(finished / "data", "train"),
        "-o",
        tmp_path / "t",
        "--vocab-size",
        280,
    )
    ids = call("tokenizer", "encode", "-t", tmp_path / "t", "The tree").stdout.split()
    assert ids == call("tokenizer", "encode", "-t", tmp_path / "t", input="The tree").stdout.split()
    pieces = call("tokenizer", "encode", "-t", tmp_path / "t", "--pieces", "The tree").stdout
    assert len(pieces.splitlines()) == len(ids) and "b'T" in pieces
    refused(
        "tokenizer", "train", split_path(finished / "data", "train"), "-o", tmp_path / "u",
        "--vocab-size", 5, text="vocab_size: expected at least",
    )  # fmt: skip


def test_a_binary_file_in_a_folder_is_skipped_with_a_warning(finished, tmp_path):
    (tmp_path / "a.txt").write_text("The tree sees the river. " * 40)
    (tmp_path / "b.txt").write_bytes(b"\0\0\0")
    warning = f"warning: skipped: {tmp_path}/b.txt: expected text, it holds binary data"
    train = ["tokenizer", "train", tmp_path, "-o", tmp_path / "t", "--vocab-size", 280]
    assert warning in call(*train).stderr
    assert warning in call("eval", "-m", finished, "--data", tmp_path, "--json").stderr


def test_from_text_to_a_model_in_four_commands(tmp_path):
    tiny_recipe.write(tmp_path)
    prepared, words, shards = tmp_path / "prepared", tmp_path / "tokenizer", tmp_path / "shards"
    config = {"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64,
              "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    call("data", "prepare", tmp_path / "docs", "-o", prepared, "--rules", "none")
    call("tokenizer", "train", split_path(prepared, "train"), "-o", words, "--vocab-size", 300)
    train = ["pretrain", "--config", tmp_path / "config.json", "-o", tmp_path / "run"]
    train += ["--max-steps", 2, "--seq-len", 16, "--tokenizer", words]
    refused(*train, "--shards", prepared, text="'fastlm data shards' makes them")
    output = call("data", "shards", prepared, "-t", words, "-o", shards).stdout
    assert (
        output.startswith(f"{shards}: ") and "for training" in output and "for evaluation" in output
    )
    log = call(*train, "--shards", shards).stderr
    assert "held-out loss" in log and (tmp_path / "run/model/config.json").exists()
    by_train = [*train[:3], "-o", tmp_path / "alone", *train[5:]]
    log = call(*by_train, "--shards", shards / "train").stderr  # one folder: nothing is held out
    assert "held-out loss" not in log
    heldout = [
        "data",
        "shards",
        split_path(prepared, "heldout"),
        "-t",
        words,
        "-o",
        tmp_path / "one",
    ]
    assert " tokens of " in call(*heldout).stdout and (tmp_path / "one/index.json").is_file()
    refused("data", "shards", tmp_path / "docs", "-t", words, "-o", tmp_path / "x",
            text="expected a corpus")  # fmt: skip
    none = ["--heldout-bytes", 0, "--rules", "none"]
    call("data", "prepare", tmp_path / "docs", "-o", prepared, *none)
    call("data", "shards", prepared, "-t", words, "-o", shards)  # now all of the text is trained on
    assert not (shards / "heldout/index.json").exists()


def test_a_model_that_is_not_there(tmp_path):
    refused("generate", "-m", tmp_path / "none", "-p", "x", text="none")


def test_interrupts_and_divergence_have_their_status(monkeypatch):
    from fastlm.train.loop import NonFiniteError, TrainingInterrupted

    for error, status in (
        (TrainingInterrupted("stopped after step 3; saved in x"), 130),
        (NonFiniteError("step 3"), 3),
    ):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr("fastlm.stages.run_recipe", fail)
        result = call("run", "x.toml", status=status)
        assert str(error) in result.stderr
    assert fastlm.cli.INTERRUPTED == 130
