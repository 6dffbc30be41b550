"""generate, chat and evaluate on a tiny model: what is printed, and what is refused."""

import json
import re
import shutil

import pytest

from tunesmith.cli.console import plain, print_beside

SHORT = ("--max-new-tokens", 6, "--dtype", "float32")


@pytest.fixture
def answer(model_folder):
    """The greedy answer of the untrained model, by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)

    def of(*messages):
        pairs = [{"role": role, "content": text} for role, text in messages]
        ids = tokenizer.apply_chat_template(pairs, add_generation_prompt=True, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            new = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        return tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)

    return of


def test_generate_prints_the_answer_and_nothing_else(run, model_folder, answer):
    outcome = run("generate", "--model", model_folder, "the cat", *SHORT)
    assert outcome.out == answer(("user", "the cat")) + "\n"
    assert outcome.err == ""


def test_generate_reads_stdin_and_takes_a_system_message(run, model_folder, answer):
    outcome = run("generate", "--model", model_folder, "-", "--system", "sat", *SHORT, stdin="the cat")
    assert outcome.out == answer(("system", "sat"), ("user", "the cat")) + "\n"


def test_generate_raw_goes_on_from_the_text(run, model_folder):
    raw = run("generate", "--model", model_folder, "the cat", "--raw", *SHORT)
    assert raw.code == 0
    assert raw.out != run("generate", "--model", model_folder, "the cat", *SHORT).out


def test_sampling_is_seeded(run, model_folder):
    words = ("generate", "--model", model_folder, "the cat", "--temperature", 1.5, "--max-new-tokens", 12)
    first, again, other = (run(*words, "--seed", seed).out for seed in (1, 1, 2))
    assert first == again != other


def test_an_adapter_is_put_on_its_base(run, model_folder, trained_run):
    by_run = run("generate", "--model", trained_run, "the cat", *SHORT)
    by_parts = run("generate", "--model", model_folder, "--adapter", trained_run / "adapter", "the cat", *SHORT)
    assert by_run.code == by_parts.code == 0
    assert by_run.out == by_parts.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["the cat", "--raw", "--system", "x"], "--raw uses no chat template"),
        (["  "], "the prompt is empty"),
        (["x", "--temperature", "-1"], "--temperature -1.0 must be 0"),
        (["x", "--max-new-tokens", "0"], "--max-new-tokens 0 must be 1"),
        (["x", "--max-new-tokens", "512"], "max_new_tokens=512 must be below the model's 512 positions"),
        (["x", "--adapter", "nowhere"], "'nowhere' is neither a folder"),
    ],
)
def test_generate_refuses(run, model_folder, words, message):
    outcome = run("generate", "--model", model_folder, *words)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err


def test_an_adapter_must_be_one_and_the_only_one(run, model_folder, trained_run):
    no_adapter = run("generate", "--model", model_folder, "--adapter", model_folder, "x")
    assert no_adapter.code == 2
    assert "is no adapter" in no_adapter.err
    second = run("generate", "--model", trained_run, "--adapter", trained_run, "x")
    assert second.code == 2
    assert "already is an adapter" in second.err


def test_chat_remembers_clears_and_obeys(run, model_folder, answer):
    first = answer(("user", "the cat"))
    second = answer(("user", "the cat"), ("assistant", first), ("user", "the dog"))
    outcome = run("chat", model_folder, *SHORT, stdin="the cat\n\nthe dog\n/clear\nthe cat\n/exit\nnever read\n")
    assert outcome.code == 0
    assert outcome.out == f"{first}\n{second}\nThe conversation is forgotten.\n{first}\n"


def test_chat_sets_the_system_message_and_starts_anew(run, model_folder, answer):
    expected = answer(("system", "sat on"), ("user", "the cat"))
    outcome = run("chat", model_folder, *SHORT, stdin="/system sat on\nthe cat\n")
    assert outcome.out == f"The system message is set.\n{expected}\n"


def test_chat_helps_with_commands(run, model_folder):
    outcome = run("chat", model_folder, stdin="/help\n/clera\n")
    assert all(name in outcome.out for name in ("/exit", "/clear", "/system TEXT", "/help"))
    assert "There is no command /clera. Did you mean '/clear'?" in outcome.out


def test_chat_forgets_what_no_longer_fits_and_says_so(run, tmp_path, model_folder):
    base = shutil.copytree(model_folder, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 160}))
    outcome = run("chat", base, "--max-new-tokens", 78, stdin="the cat sat on the mat\n" * 2)
    assert "the oldest 1 of the exchanges no longer fit and are forgotten" in outcome.out


def test_chat_goes_on_after_a_question_that_is_too_long(run, tmp_path, model_folder):
    base = shutil.copytree(model_folder, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 160}))
    outcome = run("chat", base, "--max-new-tokens", 8, stdin="the cat sat on the mat " * 40 + "\nthe cat\n/adapter\n")
    assert outcome.code == 0 and "leaves no room for 8 of an answer in the window of 160; it is" in outcome.out
    assert "base" in outcome.out  # the command behind it
    outcome = run("generate", "--model", base, "the cat sat on the mat " * 40, "--max-new-tokens", 8)
    assert (outcome.code, outcome.out) == (2, "")
    assert "leaves no room for 8 of the answer: the model has 160 positions" in outcome.err


NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_a_system_message_that_the_template_refuses(run, tmp_path, model_folder, command):
    template = tmp_path / "no-system.jinja"
    template.write_text(NO_SYSTEM)
    words = ["chat", model_folder] if command == "chat" else ["generate", "--model", model_folder, "-"]
    outcome = run(*words, "--chat-template", template, "--system", "sat", *SHORT, stdin="the cat\n")
    assert (outcome.code, outcome.out) == (2, "")
    assert "the chat template refuses the row: no system role" in outcome.err


def test_chat_reads_only_text(run, model_folder):
    outcome = run("chat", model_folder, *SHORT, stdin=b"\xff\n")
    assert outcome.code == 2
    assert outcome.err == "error: stdin is not UTF-8 text (byte 0). Convert it to UTF-8.\n"


def test_chat_needs_a_chat_template(run, tmp_path, model_folder):
    base = shutil.copytree(model_folder, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    outcome = run("chat", base, stdin="x\n")
    assert outcome.code == 2
    assert "chat_template" in outcome.err
    assert run("chat", base, "--chat-template", "chatml", *SHORT, stdin="x\n").code == 0


@pytest.fixture(scope="module")
def adapters(model_folder, tmp_path_factory):
    """Two adapters that answer otherwise than the base and than each other."""
    import torch

    from tunesmith import FastLanguageModel

    folders = [tmp_path_factory.mktemp("adapters") / name for name in ("tuned", "other")]
    for seed, folder in enumerate(folders):
        model = FastLanguageModel.from_pretrained(str(model_folder), dtype="float32")[0]
        tuned = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
        torch.manual_seed(seed)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                # Drawn on the CPU: a GPU's generator gives others, and texts that may hold breaks of lines.
                parameter.data.copy_(torch.nn.init.normal_(torch.empty(parameter.shape), std=0.3))
        tuned.save_pretrained(folder)
    return folders


def test_chat_swaps_adapters_and_goes_back_to_the_base(run, model_folder, adapters):
    tuned, other = adapters
    by_base, by_tuned, by_other = (
        run("chat", model, *SHORT, *words, stdin="the cat\n").out
        for model, words in ((model_folder, ()), (tuned, ()), (model_folder, ("--adapter", other)))
    )
    assert len({by_base, by_tuned, by_other}) == 3
    lines = "/adapter\nthe cat\n/clear\n/adapter other\nthe cat\n/clear\n/adapter base\nthe cat\n/adapter first\n"
    outcome = run("chat", model_folder, *SHORT, "--adapter", f"first={tuned}", "--adapter", other, stdin=lines)
    forgotten = "The conversation is forgotten.\n"
    assert outcome.out == (
        f"  base\n* first\n  other\n{by_tuned}{forgotten}Answers come from other now.\n{by_other}{forgotten}"
        f"Answers come from base now.\n{by_base}Answers come from first now. The conversation goes on.\n"
    )
    nested = run("chat", tuned, *SHORT, "--adapter", other, stdin="/adapter other\nthe cat\n/adapter ohter\n")
    assert f"Answers come from other now.\n{by_other}There is no adapter ohter. Did you mean 'other'?" in nested.out


def test_chat_asks_everyone_with_the_template_of_its_own(model_folder, adapters, tmp_path):
    from transformers import AutoTokenizer

    from tunesmith.cli.voices import load_voices
    from tunesmith.models.prompts import stop_token_ids

    first, bare = (shutil.copytree(adapters[index], tmp_path / name) for index, name in enumerate(("first", "bare")))
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    plain_template = tokenizer.chat_template
    tokenizer.chat_template, tokenizer.eos_token = "{{ messages[0]['content'] }}", "<|pad|>"
    tokenizer.save_pretrained(first)
    for words in ((str(model_folder), [str(first), str(bare)]), (str(first), [str(bare)])):
        voices = load_voices(*words, dtype="float32")
        found = {name: own.chat_template for name, own in voices.tokenizers.items()}
        assert found == {"base": plain_template, "first": tokenizer.chat_template, "bare": plain_template}
        assert tokenizer.eos_token_id not in stop_token_ids(voices.model, voices.tokenizers["bare"])
    voices = load_voices(str(model_folder), [str(first), str(bare)], chat_template="chatml")
    assert {own.chat_template for own in voices.tokenizers.values()} == {plain_template}


def test_chat_compares_base_and_adapter_and_goes_on_with_the_adapter(run, model_folder, adapters):
    adapter = ("--adapter", adapters[1])
    first = run("chat", model_folder, *SHORT, stdin="the cat\n").out
    tuned = run("chat", model_folder, *SHORT, *adapter, stdin="the cat\nthe dog\n").out.splitlines()
    lines = "/compare\n/compare the cat\n/compare\nthe dog\n/adapter base\n/compare x\n"
    outcome = run("chat", model_folder, *SHORT, *adapter, stdin=lines)
    both = plain(f"base:\n{first}\nother:\n{tuned[0]}\n\n")
    assert outcome.out == (
        f"There is no question yet. Give one: /compare TEXT\n{both}{both}{tuned[1]}\n"
        "Answers come from base now. The conversation goes on.\n"
        "There is nothing to compare: answers come from the base. /adapter NAME chooses another.\n"
    )


def test_texts_stand_beside_each_other_where_the_terminal_is_wide(monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    texts = {"base": "one two " * 9, "other": "three\nfour"}
    for columns, beside in (("80", True), ("60", False)):
        monkeypatch.setenv("COLUMNS", columns)
        print_beside(texts)
        out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
        assert any("one" in line and "three" in line for line in out.splitlines()) == beside
        assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adapter", "x={run}", "--adapter", "x={other}"], "the name 'x' is taken. Give it one: --adapter NAME="),
        (["--adapter", "base={run}"], "the name 'base' is taken"),
        (["--adapter", "={run}"], "the name '' is empty"),
        (["--adapter", "{run}", "--adapter", "m={model}"], "is no adapter"),
    ],
)
def test_chat_refuses_adapters(run, model_folder, adapters, words, message):
    given = [word.format(run=adapters[0], other=adapters[1], model=model_folder) for word in words]
    outcome = run("chat", model_folder, *given, stdin="x\n")
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err


def test_evaluate_puts_the_base_beside_the_tuned_model(run, trained_run, rows_file, tmp_path):
    report = tmp_path / "report.json"
    outcome = run("evaluate", "--model", trained_run, "--data", rows_file, "--metric", "exact_match", "--limit", 3,
                  *SHORT, "--output", report)  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "exact_match on 3 rows" in outcome.out
    assert "tuned - base: " in outcome.out
    assert max(len(line.rstrip()) for line in outcome.out.splitlines() if str(tmp_path) not in line) <= 80
    written = json.loads(report.read_text())
    assert (written["model"]["count"], written["base"]["count"], len(written["rows"])) == (3, 3, 3)
    assert {"answer", "base_answer", "references"} <= set(written["rows"][0])
    assert run("evaluate", "--model", trained_run, "--data", rows_file, "--metric", "exact_match",
               "--output", report).code == 2  # fmt: skip


def test_evaluate_a_plain_model_and_without_base(run, model_folder, trained_run, rows_file):
    words = ("--data", rows_file, "--metric", "perplexity", "--limit", 3)
    plain = run("evaluate", "--model", model_folder, *words).out
    alone = run("evaluate", "--model", trained_run, *words, "--no-base").out
    for shown in (plain, alone):
        assert "perplexity on 3 rows" in shown
        assert "base" not in shown
    # Perplexity is no share.
    assert "%" not in plain.replace("95 % interval", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metric", "exact"], "exact_match"),
        (["--metric", "perplexity", "--temperature", "1"], "--temperature: without effect on perplexity"),
        (
            ["--metric", "perplexity", "--max-new-tokens", "3", "--batch-size", "2"],
            "--max-new-tokens, --batch-size: with",
        ),
        (["--metric", "json_match"], "json"),
        (["--metric", "exact_match", "--limit", "0"], "limit is 0"),
        (["--metric", "exact_match", "--output", "/nowhere/report.json"], "does not exist"),
    ],
)
def test_evaluate_refuses(run, model_folder, rows_file, words, message):
    outcome = run("evaluate", "--model", model_folder, "--data", rows_file, *words)
    assert outcome.code == 2
    assert message in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_slow_answers_have_a_speed_too():
    from types import SimpleNamespace

    from tunesmith.cli.evaluate import _side

    score = SimpleNamespace(value=1.0, low=0.5, high=1.0, per_row=[1], count=1)
    assert _side(SimpleNamespace(score=score, tokens=2, seconds=10.0), is_share=True)[-2] == "0.2"
