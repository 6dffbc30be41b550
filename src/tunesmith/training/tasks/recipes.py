"""One class a task: how its rows become a batch, what its loss is, what it predicts and how that is scored.

Batches are padded on the right whatever the tokenizer's own side is: models with absolute positions would see others
on the left. What is padding is known by lengths, never by an id.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy, normalize

from tunesmith.core.errors import DataError, ModelError, SettingsError
from tunesmith.core.tasks import TASKS
from tunesmith.data.tasks import IGNORED, TaskRow
from tunesmith.models.embed import mean_pooled
from tunesmith.models.heads import labels_of, reads
from tunesmith.models.load import facts_of
from tunesmith.training.tasks.scores import are_span_tags, macro_f1, share, span_f1, text_f1

__all__ = ["Recipe", "recipe_for"]

Batch = dict[str, torch.Tensor]


class Recipe:
    """What the trainer needs to know of a task.

    Attributes:
        best: the figure of :meth:`score` by which a model is judged, a share of ``counts``.
        counts: what it counts, in words.
        smooths: whether labels can be smoothed: not where some classes are out of the question.
    """

    best = "accuracy"
    counts = "rows"
    smooths = True

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.labels = labels_of(model.config)
        fills = {"input_ids": tokenizer.pad_token_id, "token_type_ids": 0}
        self.fills = {name: fill for name, fill in fills.items() if reads(model, name)}

    def collate(self, rows: Sequence[TaskRow]) -> Batch:
        """Return the inputs of the model for ``rows``, padded, and their ``labels``."""
        batch = self.padded([row.features for row in rows])
        batch["labels"] = torch.tensor([row.features["labels"] for row in rows])
        return batch

    def loss(self, model: Any, batch: Mapping[str, torch.Tensor], smoothing: float = 0.0) -> tuple[torch.Tensor, Any]:
        """Return the loss summed over all labels of a batch, and the model's outputs."""
        outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
        return _summed(outputs.logits, batch["labels"], smoothing), outputs

    def items(self, batch: Mapping[str, torch.Tensor]) -> int:
        """Return how many labels the loss of a batch is summed over."""
        return int((batch["labels"] != IGNORED).sum())

    def predict(self, model: Any, batch: Mapping[str, torch.Tensor], outputs: Any) -> list[Any]:
        """Return what the model says of each row of a batch, as tensors or numbers."""
        return outputs.logits.argmax(-1).tolist()

    def answers(self, rows: Sequence[TaskRow], predicted: Sequence[Any]) -> list[Any]:
        """Return what was predicted for each row in words: here the name of a label."""
        return [self.labels[number] for number in predicted]

    def score(self, rows: Sequence[TaskRow], answers: Sequence[Any]) -> dict[str, float]:
        """Return the figures of the task over all rows."""
        right = [self.labels[row.features["labels"]] for row in rows]
        hits = [truth == answer for truth, answer in zip(right, answers, strict=True)]
        return {"accuracy": share(hits), "macro_f1": macro_f1(right, answers)}

    def size(self, rows: Sequence[TaskRow]) -> int:
        """Return how many things :attr:`best` is a share of."""
        return len(rows)

    def needs_others(self, rows: Sequence[TaskRow]) -> bool:
        """Return whether a row that is alone in its batch may teach nothing."""
        return False

    def check(self, rows: Sequence[TaskRow], batch_size: int) -> None:
        """Refuse rows that teach nothing, and have no loss, in batches of ``batch_size``.

        Raises:
            SettingsError: they would in larger ones.
            DataError: they never do.
        """

    def padded(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        """Return ``input_ids``, ``attention_mask`` and what else ``features`` hold, (B, T)."""
        longest = max(len(feature["input_ids"]) for feature in features)
        lengths = torch.tensor([len(feature["input_ids"]) for feature in features])
        batch = {
            name: torch.tensor([feature[name] + [fill] * (longest - len(feature[name])) for feature in features])
            for name, fill in self.fills.items()
            if name in features[0]
        }
        batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        return batch


class Tagging(Recipe):
    """TOKEN_CLS: a tag for the first piece of each word."""

    counts = "words"

    def collate(self, rows: Sequence[TaskRow]) -> Batch:
        """Return the inputs and ``labels`` (B, T)."""
        batch = self.padded([row.features for row in rows])
        batch["labels"] = _padded_labels([row.features["labels"] for row in rows])
        return batch

    def answers(self, rows: Sequence[TaskRow], predicted: Sequence[Any]) -> list[list[str]]:
        """Return the tags of each row, one a word that has a token of its own."""
        return [
            [
                self.labels[number]
                for number, label in zip(line, row.features["labels"], strict=False)
                if label != IGNORED
            ]
            for line, row in zip(predicted, rows, strict=True)
        ]

    def score(self, rows: Sequence[TaskRow], answers: Sequence[Any]) -> dict[str, float]:
        """Return the accuracy over words and the F1 of spans, or of tags where they mark no spans."""
        right = self.answers(rows, [row.features["labels"] for row in rows])
        truths, guesses = ([tag for line in side for tag in line] for side in (right, answers))
        figures = {"accuracy": share([a == b for a, b in zip(truths, guesses, strict=True)])}
        if are_span_tags(self.labels):
            return {**figures, "span_f1": span_f1(right, answers)}
        return {**figures, "macro_f1": macro_f1(truths, guesses)}

    def size(self, rows: Sequence[TaskRow]) -> int:
        """Return the number of words."""
        return sum(n != IGNORED for row in rows for n in row.features["labels"])


class Answering(Recipe):
    """QUESTION_ANS: the first and the last token of the answer."""

    best = "exact_match"
    smooths = False

    def loss(self, model: Any, batch: Mapping[str, torch.Tensor], smoothing: float = 0.0) -> tuple[torch.Tensor, Any]:
        """Return the loss of first and last token (Devlin et al. 2019, arXiv:1810.04805); padding is never one."""
        outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
        padding = batch["attention_mask"] == 0
        first, last = (
            _summed(logits.masked_fill(padding, float("-inf")), at, smoothing)
            for logits, at in zip((outputs.start_logits, outputs.end_logits), batch["labels"].unbind(1), strict=True)
        )
        return first + last, outputs

    def predict(self, model: Any, batch: Mapping[str, torch.Tensor], outputs: Any) -> list[Any]:
        """Return the logits of both ends, (2, T): which tokens may be one is known to the row."""
        return list(torch.stack([outputs.start_logits, outputs.end_logits], 1).float().cpu())

    def answers(self, rows: Sequence[TaskRow], predicted: Sequence[Any]) -> list[str]:
        """Return the likeliest span of each context, "" where no answer is likelier."""
        return [_best_span(logits, row.reference) for row, logits in zip(rows, predicted, strict=True)]

    def score(self, rows: Sequence[TaskRow], answers: Sequence[Any]) -> dict[str, float]:
        """Return exact match and the F1 of words, each with the best of a row's answers."""
        right = [[text.strip() for text in row.reference["answers"]] for row in rows]
        return {
            "exact_match": share([answer in texts for answer, texts in zip(answers, right, strict=True)]),
            "f1": sum(max(text_f1(a, t) for t in texts) for a, texts in zip(answers, right, strict=True)) / len(rows),
        }


class Translating(Recipe):
    """SEQ_2_SEQ_LM: the target as the decoder writes it."""

    best = "exact_match"

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if self.base.config.decoder_start_token_id is None:
            raise ModelError(f"{type(self.base).__name__} has no decoder_start_token_id. Write it into config.json.")

    def collate(self, rows: Sequence[TaskRow]) -> Batch:
        """Return the inputs of the encoder, those of the decoder, and ``labels`` (B, T)."""
        batch = self.padded([row.features for row in rows])
        batch["labels"] = _padded_labels([row.features["labels"] for row in rows])
        batch["decoder_input_ids"] = self.base.prepare_decoder_input_ids_from_labels(batch["labels"])
        return batch

    def predict(self, model: Any, batch: Mapping[str, torch.Tensor], outputs: Any) -> list[str]:
        """Return what the model writes, the likeliest token at a time and as long as the longest label."""
        written = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=batch["labels"].shape[1],
            do_sample=False,
            num_beams=1,
        )
        return self.tokenizer.batch_decode(written, skip_special_tokens=True)

    def answers(self, rows: Sequence[TaskRow], predicted: Sequence[Any]) -> list[str]:
        """Return the written texts."""
        return [text.strip() for text in predicted]

    def score(self, rows: Sequence[TaskRow], answers: Sequence[Any]) -> dict[str, float]:
        """Return the share of targets that were written exactly."""
        # Compared as the tokenizer writes it: many put no space back before a full stop.
        right = [self.tokenizer.decode(row.features["labels"], skip_special_tokens=True).strip() for row in rows]
        return {"exact_match": share([truth == answer for truth, answer in zip(right, answers, strict=True)])}


class Embedding(Recipe):
    """FEATURE_EXTRACTION: anchors near their positives, away from those of the other rows of the batch.

    The loss is the cross entropy of the anchor's own positive among all positives and negatives of the batch, on the
    cosine of mean-pooled vectors over a temperature of 0.05 (Henderson et al. 2017, arXiv:1705.00652). Neither the
    anchor's own text nor a positive of an equal anchor is a negative; texts are equal whose token ids are. More rows a
    batch are more negatives; accumulation adds none.
    """

    best = "retrieval_at_1"
    smooths = False
    temperature = 0.05

    def collate(self, rows: Sequence[TaskRow]) -> Batch:
        """Return all texts in one batch, (2 B or more, T), anchors first; ``labels`` (B, N) mark the own positives.

        1 is the own positive, 0 a negative, IGNORED neither.
        """
        others = [row.features["positive"] for row in rows]
        others += [row.features["negative"] for row in rows if "negative" in row.features]
        batch = self.padded([row.features["anchor"] for row in rows] + others)
        allowed, ids = _no_negatives(rows), [tuple(other["input_ids"]) for other in others]
        equal = torch.tensor([[other in allowed[_ids(row, "anchor")] for other in ids] for row in rows])
        own = torch.eye(len(rows), len(others), dtype=torch.bool)
        batch["labels"] = torch.where(own, 1, torch.where(equal, IGNORED, 0))
        return batch

    def loss(self, model: Any, batch: Mapping[str, torch.Tensor], smoothing: float = 0.0) -> tuple[torch.Tensor, Any]:
        """Return the summed loss of the anchors, and the vectors of all texts."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        vectors = normalize(mean_pooled(model(**inputs).last_hidden_state, batch["attention_mask"]), dim=-1)
        anchors, others = vectors.split([len(batch["labels"]), len(vectors) - len(batch["labels"])])
        logits = (anchors @ others.T / self.temperature).masked_fill(batch["labels"] == IGNORED, float("-inf"))
        return _summed(logits, torch.arange(len(anchors), device=logits.device), smoothing), vectors

    def items(self, batch: Mapping[str, torch.Tensor]) -> int:
        """Return the number of anchors that have a negative."""
        return int((batch["labels"] == 0).any(1).sum())

    def predict(self, model: Any, batch: Mapping[str, torch.Tensor], outputs: Any) -> list[torch.Tensor]:
        """Return the vectors of anchor and positive of each row, (2, D)."""
        count = len(batch["labels"])
        return list(torch.stack([outputs[:count], outputs[count : 2 * count]], 1).cpu())

    def answers(self, rows: Sequence[TaskRow], predicted: Sequence[Any]) -> list[str]:
        """Return the positive, of all rows, that is nearest to each anchor; its own text is none."""
        anchors, positives = torch.stack(list(predicted)).unbind(1)
        nearness, places = anchors @ positives.T, defaultdict[tuple[int, ...], list[int]](list)
        for at, row in enumerate(rows):
            places[_ids(row, "positive")].append(at)
        for at, row in enumerate(rows):
            nearness[at, [other for other in places.get(_ids(row, "anchor"), ()) if other != at]] = float("-inf")
        return [rows[at].reference for at in nearness.argmax(1).tolist()]

    def score(self, rows: Sequence[TaskRow], answers: Sequence[Any]) -> dict[str, float]:
        """Return the share of anchors whose nearest text is a positive of theirs, or of an equal anchor."""
        allowed, ids = _no_negatives(rows), {row.reference: _ids(row, "positive") for row in rows}
        hits = [ids[text] in allowed[_ids(row, "anchor")] for row, text in zip(rows, answers, strict=True)]
        return {"retrieval_at_1": share(hits)}

    def needs_others(self, rows: Sequence[TaskRow]) -> bool:
        """Return whether some row has no negative of its own."""
        return any("negative" not in row.features for row in rows)

    def check(self, rows: Sequence[TaskRow], batch_size: int) -> None:
        """See :meth:`Recipe.check`."""
        if batch_size == 1 and self.needs_others(rows):
            raise SettingsError(
                "FEATURE_EXTRACTION with a batch size of 1: a row without a negative would have nothing that its "
                "positive is told apart from. Use 2 or more (per_device_train_batch_size and, to evaluate, "
                "per_device_eval_batch_size), or give every row a negative."
            )
        texts = {_ids(row, side) for row in rows for side in ("positive", "negative") if side in row.features}
        if all(texts <= allowed for allowed in _no_negatives(rows).values()):
            raise DataError(
                f"FEATURE_EXTRACTION: {len(rows):,} rows hold no text that an anchor's positive could be told apart "
                "from. Give rows with other positives, or with negatives."
            )


_RECIPES: dict[str, type[Recipe]] = {
    "SEQ_CLS": Recipe,
    "TOKEN_CLS": Tagging,
    "QUESTION_ANS": Answering,
    "SEQ_2_SEQ_LM": Translating,
    "FEATURE_EXTRACTION": Embedding,
}


def recipe_for(model: Any, tokenizer: Any) -> Recipe:
    """Return the recipe for the task of ``model``.

    Raises:
        ModelError: it is a causal language model, which ``SFTTrainer`` trains, or has a head for one number.
    """
    task = facts_of(model).task
    if task not in _RECIPES:
        raise ModelError(
            f"{type(model).__name__} is a model for {task}, which SFTTrainer trains. For another task load it with "
            "from_pretrained(..., task_type=...)."
        )
    if TASKS[task].has_labels and len(labels_of(model.config)) < 2:
        raise ModelError(
            f"{type(model).__name__} has one label (a head for one number), so there is nothing to tell apart."
        )
    if task == "SEQ_CLS":
        # Pipelines would otherwise read a base for several labels a row as one still.
        model.config.problem_type = "single_label_classification"
    return _RECIPES[task](model, tokenizer)


def _ids(row: TaskRow, side: str) -> tuple[int, ...]:
    return tuple(row.features[side]["input_ids"])


def _no_negatives(rows: Sequence[TaskRow]) -> dict[tuple[int, ...], set[tuple[int, ...]]]:
    """Return, as token ids, anchor -> the texts that are no negatives of it: itself, and the positives of its rows."""
    found: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for row in rows:
        anchor = _ids(row, "anchor")
        found.setdefault(anchor, {anchor}).add(_ids(row, "positive"))
    return found


def _summed(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Return the summed cross entropy of ``logits`` (..., C) over ``labels`` (...), in float32."""
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return cross_entropy(flat, labels.reshape(-1), reduction="sum", ignore_index=IGNORED, label_smoothing=smoothing)


def _padded_labels(labels: Sequence[Sequence[int]]) -> torch.Tensor:
    longest = max(map(len, labels))
    return torch.tensor([[*line, *[IGNORED] * (longest - len(line))] for line in labels])


def _best_span(logits: torch.Tensor, reference: Mapping[str, Any]) -> str:
    """Return the text of the likeliest span inside the context, "" where that there is none is likelier."""
    spans = reference["spans"]
    inside = torch.tensor([span is not None for span in spans])
    start, end = (side[: len(spans)] for side in logits)
    both = start[:, None] + end[None, :]
    # The last token is not before the first, and both are of the context.
    allowed = (inside[:, None] & inside[None, :]).triu()
    best = both.masked_fill(~allowed, float("-inf")).argmax()
    first, last = divmod(int(best), len(spans))
    if both[0, 0] > both[first, last] or not allowed.any():
        return ""
    return reference["context"][spans[first][0] : spans[last][1]].strip()
