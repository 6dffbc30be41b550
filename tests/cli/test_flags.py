import pytest

from tunesmith.cli.flags import given_settings
from tunesmith.cli.reference import settings_reference
from tunesmith.core.errors import SettingsError
from tunesmith.training.settings import RunSettings, load_run_settings

NEEDED = {"model": "m", "data": "d"}


def resolve(flags, assignments=()):
    return load_run_settings(None, given_settings({**NEEDED, **flags}, assignments))[0]


def test_there_is_a_flag_for_every_setting(run):
    shown = run("train", "--help").out
    assert {setting.name for setting in settings_reference()} == set(RunSettings.model_fields)
    assert [setting.flag for setting in settings_reference() if setting.flag not in shown] == []


def test_what_a_run_cannot_do_without_is_marked(run):
    shown = " ".join(run("train", "--help").out.replace("│", " ").split())
    assert shown.count("(required)") == 2


@pytest.mark.parametrize(
    ("name", "typed", "value"),
    [
        ("learning_rate", "1e-3", 1e-3),
        ("r", "8", 8),
        ("max_length", "none", None),
        ("packing", True, True),
        ("no_packing", True, False),
        ("use_gradient_checkpointing", "false", False),
        ("use_gradient_checkpointing", "unsloth", "unsloth"),
        ("target_modules", ["q_proj,v_proj"], ["q_proj", "v_proj"]),
        ("target_modules", ["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        ("target_modules", ["all-linear"], "all-linear"),
        ("target_modules", [r".*\.(q|v)_proj{1,2}"], r".*\.(q|v)_proj{1,2}"),
        ("target_modules", ["none"], None),
        ("layers_to_transform", ["0,2"], [0, 2]),
        ("map", ["question=user,answer=assistant"], {"question": "user", "answer": "assistant"}),
        ("map", ["a=b,c=user", "answer=assistant"], {"a": "b", "c": "user", "answer": "assistant"}),
        ("map", ["x,y=user", "answer=assistant"], {"x,y": "user", "answer": "assistant"}),
        ("rank_pattern", ["down_proj=32"], {"down_proj": 32}),
        ("report_to", ["wandb,tensorboard"], ["wandb", "tensorboard"]),
        ("bias", "none", "none"),
    ],
)
def test_what_is_typed_is_read_as_the_yaml_file_would_be(name, typed, value):
    assert getattr(resolve({name: typed}), name.removeprefix("no_")) == value


def test_assignments_are_yaml_and_take_names_of_other_tools():
    settings = resolve({"lora_r": "4"}, ["lr=1e-3", "target_modules=[q_proj]", "max_length=null"])
    assert (settings.learning_rate, settings.target_modules, settings.r) == (1e-3, ["q_proj"], 4)


@pytest.mark.parametrize(
    ("flags", "assignments", "message"),
    [
        ({"r": "8"}, ["r=16"], "r is given twice"),
        ({"r": "8"}, ["lora_r=16"], "same setting"),
        ({"packing": True, "no_packing": True}, [], "--packing and --no-packing"),
        ({"map": ["question"]}, [], "write COLUMN=ROLE"),
        ({"rank_pattern": ["x"]}, [], "write NAME=NUMBER"),
        ({"map": ["a=user", "a=assistant"]}, [], "'a' is given twice"),
        ({}, ["r"], "write key=value"),
    ],
)
def test_what_contradicts_itself_is_refused(flags, assignments, message):
    with pytest.raises(SettingsError, match=message):
        resolve(flags, assignments)
