"""Training on pairs (FEATURE_EXTRACTION): what is a negative, what is retrieved, and rows that teach nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny_tasks
from tests.training.test_tasks import load, trainer

from tunesmith.core.errors import DataError, SettingsError
from tunesmith.data.task_rows import read_records
from tunesmith.data.tasks import IGNORED, prepare_records
from tunesmith.training.tasks.recipes import recipe_for
from tunesmith.training.tasks.trainer import score_rows


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"bert": tiny_tasks.save_base(tmp_path_factory.mktemp("base"))}


def test_positives_that_are_equal_are_no_negatives(bases: Any, tmp_path: Path) -> None:
    model, tokenizer = load(bases, "FEATURE_EXTRACTION")
    rows = [{"anchor": "ann", "positive": "figs"}, {"anchor": "bob", "positive": "figs"},
            {"anchor": "eve", "positive": "nuts", "negative": "limes"}]  # fmt: skip
    made = trainer(tmp_path, model, tokenizer, "FEATURE_EXTRACTION", rows=rows)
    batch = made.recipe.collate(made.train_data.rows)
    x = IGNORED
    assert batch["labels"].tolist() == [[1, x, 0, 0], [x, 1, 0, 0], [0, 0, 1, 0]]
    model.eval()
    with torch.no_grad():
        loss, vectors = made.recipe.loss(model, batch)
    logits = (vectors[:3] @ vectors[3:].T / 0.05).double()
    wanted = sum(
        -torch.log_softmax(logits[i, [j for j in range(4) if batch["labels"][i, j] != x]], 0)[own]
        for i, own in ((0, 0), (1, 0), (2, 2))
    )
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-4, atol=1e-4)


def pairs(*texts: str) -> list[dict[str, str]]:
    """Return rows of "anchor positive" or "anchor positive negative"."""
    return [dict(zip(("anchor", "positive", "negative"), row.split(), strict=False)) for row in texts]


@pytest.mark.parametrize(
    ("texts", "labels"),
    [
        (("ann figs", "Ann nuts", "bob plums"), [[1, IGNORED, 0], [IGNORED, 1, 0], [0, 0, 1]]),
        (("ann figs", "bob Figs", "eve nuts"), [[1, IGNORED, 0], [IGNORED, 1, 0], [0, 0, 1]]),
        (("ann bob", "bob ann", "eve nuts"), [[1, IGNORED, 0], [IGNORED, 1, 0], [0, 0, 1]]),
        (("ann figs nuts", "ann nuts figs"), [[1, IGNORED, IGNORED, IGNORED], [IGNORED, 1, IGNORED, IGNORED]]),
    ],
)  # fmt: skip
def test_what_is_right_for_an_equal_anchor_is_no_negative(bases: Any, texts: Any, labels: Any) -> None:
    """Several positives, an anchor that is another row's positive, texts that differ in case alone."""
    model, tokenizer = load(bases, "FEATURE_EXTRACTION")
    recipe = recipe_for(model, tokenizer)
    rows = prepare_records(read_records(pairs(*texts), "FEATURE_EXTRACTION"), "FEATURE_EXTRACTION", tokenizer,
                           max_length=64).rows  # fmt: skip
    batch = recipe.collate(rows)
    assert batch["labels"].tolist() == labels
    assert recipe.items(batch) == sum(0 in line for line in labels)
    # Anchors lie where their positives do, all but the last on one spot: the nearest is never a wrong one.
    spots = torch.eye(2)[[0] * (len(rows) - 1) + [1]]
    answers = recipe.answers(rows, list(torch.stack([spots, spots], 1)))
    assert recipe.score(rows, answers) == {"retrieval_at_1": 1}
    wrong = recipe.answers(rows, list(torch.stack([spots, 1 - spots], 1)))
    assert recipe.score(rows, wrong)["retrieval_at_1"] < 1 or IGNORED in labels[-1]


@pytest.mark.parametrize(
    ("texts", "settings", "error", "message"),
    [
        (("ann figs", "bob nuts"), {"per_device_train_batch_size": 1}, SettingsError, "a batch size of 1: a row with"),
        (("ann figs", "bob nuts"), {"per_device_eval_batch_size": 1}, SettingsError, "per_device_eval_batch_size"),
        (("ann figs", "bob figs"), {}, DataError, "2 rows hold no text that an anchor's positive could be told apart"),
        (("ann figs", "figs ann"), {}, DataError, "2 rows hold no text that an anchor's positive could be told apart"),
    ],
)
def test_rows_with_nothing_to_tell_apart_are_refused(
    bases: Any, tmp_path: Path, texts: Any, settings: Any, error: Any, message: str
) -> None:
    model, tokenizer = load(bases, "FEATURE_EXTRACTION")
    held_out = pairs("eve limes", "gus kiwis")
    with pytest.raises(error, match=message):
        trainer(tmp_path, model, tokenizer, "FEATURE_EXTRACTION", rows=pairs(*texts), eval_dataset=held_out, **settings)
    made = trainer(tmp_path, model, tokenizer, "FEATURE_EXTRACTION")
    made.args.per_device_eval_batch_size = 1 if settings else 2
    with pytest.raises(error, match="a batch size of 1" if settings else message):
        made.evaluate(pairs(*texts))


def test_rows_with_negatives_train_one_at_a_time(bases: Any, tmp_path: Path) -> None:
    model, tokenizer = load(bases, "FEATURE_EXTRACTION")
    rows = pairs("ann figs nuts", "bob nuts figs", "eve limes figs")
    sizes = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    made = trainer(tmp_path, model, tokenizer, "FEATURE_EXTRACTION", rows=rows, eval_dataset=rows, **sizes)
    made.train()
    assert made.evaluate()["eval_loss"] > 0


def test_a_row_that_would_be_alone_is_left_out_and_that_is_said(bases: Any, tmp_path: Path, caplog: Any) -> None:
    model, tokenizer = load(bases, "FEATURE_EXTRACTION")
    made = trainer(tmp_path, model, tokenizer, "FEATURE_EXTRACTION", rows=9, per_device_eval_batch_size=2,
                   eval_dataset=tiny_tasks.pair_rows(3, seed=1))  # fmt: skip
    assert "9 rows in batches of 4 leave one row of each epoch alone" in caplog.text
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert len(losses) == 2 and min(losses) > 0
    # The last row of an evaluation has no loss to be a mean of, and is retrieved all the same.
    score = made.evaluate()
    two = score_rows(made.model, made.recipe, made.eval_data.rows[:2], batch_size=2)[0]
    assert score["eval_loss"] == pytest.approx(two["loss"])


def test_a_first_step_without_negatives_is_no_dead_adapter(bases: Any, tmp_path: Path) -> None:
    model, tokenizer = load(bases, "FEATURE_EXTRACTION")
    rows = [*pairs("ann figs", "bob figs", "cid figs", "dora figs"), *pairs("eve nuts", "finn plums")]
    made = trainer(tmp_path, model, tokenizer, "FEATURE_EXTRACTION", rows=rows, max_steps=2)
    made._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(made.train_data)
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses[0] == 0 < losses[1]
