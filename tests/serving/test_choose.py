"""Tokens are drawn as transformers' own processors would leave them, each sequence by its own settings."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tunesmith.models.sampling import Sampling
from tunesmith.serving import choose as choose_module
from tunesmith.serving.choose import Chooser, choose

SETTINGS = {
    "temperature": Sampling(temperature=0.7),
    "top_p": Sampling(temperature=1.3, top_p=0.6),
    "top_k": Sampling(temperature=1.0, top_k=3),
    "top_k, then top_p": Sampling(temperature=3.0, top_p=0.9, top_k=40),
    "min_p": Sampling(temperature=2.0, min_p=0.2),
    "all": Sampling(temperature=1.5, top_p=0.8, top_k=12, min_p=0.1, repetition_penalty=1.4),
}


def expected(logits: torch.Tensor, prompt: list[int], sampling: Sampling) -> torch.Tensor:
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)])
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    return processors(torch.tensor([prompt]), logits[None].clone())[0].softmax(-1)


@pytest.mark.parametrize("candidates", [8, 1024])
@pytest.mark.parametrize("name", SETTINGS)
def test_draws_follow_the_distribution_of_transformers(monkeypatch, name, candidates):
    monkeypatch.setattr(choose_module, "_CANDIDATES", candidates)
    sampling, prompt, count = SETTINGS[name], [3, 5, 5], 2000
    logits = torch.randn(50) * 2
    choosers = [Chooser.of(sampling, seed, prompt) for seed in range(count)]
    found = Counter(choice.token for choice in choose(logits.expand(count, -1), choosers))
    wanted = expected(logits, prompt, sampling)
    assert all(wanted[token] > 0 for token in found)
    for token, probability in enumerate(wanted.tolist()):
        spread = (probability * (1 - probability) / count) ** 0.5
        assert abs(found[token] / count - probability) <= 4.5 * spread + 1e-9


def test_the_likeliest_token_is_taken_without_temperature_beside_rows_that_draw():
    logits = torch.randn(3, 40)
    choosers = [Chooser.of(Sampling(), 0, [1]), Chooser.of(Sampling(temperature=9.0), 1, [1])]
    choosers.append(Chooser.of(Sampling(temperature=9.0, top_k=1), 2, [1]))
    chosen = [choice.token for choice in choose(logits, choosers)]
    assert chosen[0] == logits[0].argmax()
    assert chosen[2] == logits[2].argmax()
    nearly = torch.tensor([[0.0, 1e-7]]).expand(20, -1)
    cold = [Chooser.of(Sampling(temperature=1e-6), seed, [1]) for seed in range(20)]
    assert {choice.token for choice in choose(nearly, cold)} == {1}, "so low a temperature is none"


def test_penalties_of_openai_count_what_the_answer_has():
    logits = torch.tensor([[1.0, 0.9, 0.2]])
    chooser = Chooser.of(Sampling(), 0, [0, 0], presence_penalty=0.05, frequency_penalty=0.15)
    # 0: 1.0 -> 0.8 -> 0.65; 1: 0.9 -> 0.7 -> 0.55
    assert [choose(logits, [chooser])[0].token for _ in range(5)] == [0, 1, 0, 1, 0]


def test_scores_that_are_no_numbers_give_no_token_and_leave_the_rows_beside_them_alone():
    logits = torch.randn(4, 40)
    logits[1], logits[2, 3], logits[3, :20] = float("nan"), float("inf"), float("-inf")
    for sampling in (Sampling(), Sampling(temperature=1.0, top_p=0.9)):
        choices = choose(logits, [Chooser.of(sampling, row, [1], top_logprobs=2) for row in range(4)])
        alone = [choose(logits[row : row + 1], [Chooser.of(sampling, row, [1])])[0] for row in (0, 3)]
        assert choices[1:3] == [None, None]
        assert [choices[0].token, choices[3].token] == [choice.token for choice in alone]
        assert choices[3].token >= 20 and choices[3].logprob == choices[3].logprob
    # Near the end of float32 a low temperature divides into infinity.
    assert choose(logits[:1] * 1e37, [Chooser.of(Sampling(temperature=0.01), 0, [1])])[0].token == logits[0].argmax()


def test_log_probabilities_are_given_only_where_they_are_wanted():
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    plain, told = choose(logits, [Chooser.of(Sampling(), 0, [0]), Chooser.of(Sampling(), 0, [0], top_logprobs=2)])
    assert plain.top == () and plain.logprob != plain.logprob
    assert told.logprob == pytest.approx(logits[1].log_softmax(-1)[2].item())
    assert [token for token, _ in told.top] == [2, 1]


@pytest.mark.parametrize("logits", [[2.0, 1.9], [-1.0, -1.2]])
def test_the_repetition_penalty_lowers_what_the_prompt_has(logits):
    (choice,) = choose(torch.tensor([logits]), [Chooser.of(Sampling(repetition_penalty=1.4), 0, [0])])
    assert choice.token == 1


def test_top_p_counts_in_what_top_k_leaves():
    """0.4 is 0.57 of the two that top_k leaves, and reaches top_p by itself."""
    logits = torch.tensor([0.4, 0.3, 0.3]).log()
    choosers = [Chooser.of(Sampling(temperature=1.0, top_k=2, top_p=0.5), seed, [0]) for seed in range(50)]
    assert {choice.token for choice in choose(logits.expand(50, -1), choosers)} == {0}


def test_log_probabilities_are_those_before_penalties():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    chooser = Chooser.of(Sampling(repetition_penalty=4.0), 0, [0], top_logprobs=1)
    (choice,) = choose(logits, [chooser])
    wanted = logits[0].log_softmax(-1).tolist()
    assert choice.token == 1 and choice.logprob == pytest.approx(wanted[1])
    assert choice.top == ((0, pytest.approx(wanted[0])),)
