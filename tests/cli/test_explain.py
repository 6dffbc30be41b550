from pathlib import Path

import pytest

from tunesmith.cli.explain import markdown_page
from tunesmith.cli.reference import find_setting, settings_reference, written
from tunesmith.core.errors import SettingsError


def test_the_docs_page_is_the_generated_one():
    page = Path(__file__).parents[2] / "docs" / "parameters.md"
    assert page.read_text(encoding="utf-8") == markdown_page(), "run `make docs`"


def test_every_setting_says_what_it_means():
    assert [setting.name for setting in settings_reference() if len(setting.meaning) < 10] == []


def test_every_argument_of_the_public_calls_is_explained():
    from inspect import signature

    from tunesmith import FastLanguageModel
    from tunesmith.training.aliases import ALIASES

    known = {setting.name for setting in settings_reference(in_scripts=True)} | set(ALIASES)
    for function in (FastLanguageModel.from_pretrained, FastLanguageModel.get_peft_model):
        assert set(signature(function).parameters) - known - {"model", "unknown"} == set(), function.__qualname__


def test_explain_prints_everything_known_of_a_setting(run):
    shown = " ".join(run("explain", "learning_rate").out.split())
    setting, _ = find_setting("learning_rate")
    guide = setting.guide
    for text in (setting.meaning, setting.allowed, "2e-4", guide.typical, guide.low, guide.high, "lr"):
        assert text in shown


def test_a_name_of_another_tool_leads_to_ours(run):
    assert run("explain", "lora_r").out.startswith("lora_r is our r.\n")


@pytest.mark.parametrize("name", ["--learning-rate", "learning-rate"])
def test_a_flag_is_a_name_too(name):
    assert find_setting(name)[0].name == "learning_rate"


def test_an_unknown_name_is_refused_with_the_nearest(run):
    outcome = run("explain", "learning_rat")
    assert outcome.code == 2
    assert "'learning_rate'" in outcome.err
    with pytest.raises(SettingsError, match="no setting 'xyzzy'"):
        find_setting("xyzzy")


def test_every_kind_of_checkpointing_is_explained(run):
    shown = " ".join(run("explain", "use_gradient_checkpointing").out.split())
    assert all(f'"{word}"' in shown for word in ("unsloth", "auto", "selective", "offload"))


def test_without_a_name_all_are_listed_in_80_columns(run):
    shown = run("explain").out
    assert [setting.name for setting in settings_reference() if setting.name not in shown] == []
    assert max(map(len, shown.splitlines())) <= 80


def test_a_summary_does_not_end_inside_a_citation():
    assert find_setting("neftune_noise_alpha")[0].summary.endswith("arXiv:2310.05914)")


def test_no_summary_is_cut_inside_brackets():
    summaries = [setting.summary for setting in settings_reference(in_scripts=True)]
    assert [text for text in summaries if text.count("(") != text.count(")") or "\n" in text] == []


@pytest.mark.parametrize(
    ("name", "titles"),
    [("packing", {"off", "on"}), ("r", {"too low", "too high"}), ("on_too_long", {"choices"}), ("bias", {"choices"})],
)
def test_advice_is_headed_by_what_a_setting_can_be(run, name, titles):
    shown = run("explain", name).out
    heads = {"off", "on", "too low", "too high", "choices"}
    assert {head for head in heads if f"\n{head}  " in shown} == titles


def test_a_default_that_is_the_word_none_is_quoted():
    assert (find_setting("bias")[0].default, find_setting("max_steps")[0].default) == ('"none"', "none")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "none"), ("none", '"none"'), (True, "true"), (2e-4, "2e-4"), (0.05, "0.05"), (0.0, "0"), (16, "16")],
)
def test_values_are_written_as_people_type_them(value, text):
    assert written(value) == text
