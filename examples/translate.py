"""SEQ_2_SEQ_LM on real rows, a BART from scratch: 1945-07-12 becomes July 12, 1945.  python examples/translate.py

Needs rows: pip install --no-deps evals==3.0.1.post1. The same on the command line:
tunesmith train --task seq2seq --full-finetuning --model runs/translate/base --data rows.jsonl
"""

import calendar

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from real_rows import evals_rows
from tunesmith import FastLanguageModel, SFTConfig, TaskTrainer


def save_base(folder: str) -> None:
    """Write a small random BART and a tokenizer of months and single characters."""
    words = ["<pad>", "</s>", "<unk>", *calendar.month_name[1:], *"0123456789-, ."]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[A-Z][a-z]+|."), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 1, "forced_eos_token_id": None}
    config = BartConfig(
        vocab_size=len(words), d_model=64, encoder_ffn_dim=128, decoder_ffn_dim=128, init_std=0.05,
        max_position_embeddings=64, **sizes, **tokens,
    )  # fmt: skip
    BartForConditionalGeneration(config).save_pretrained(f"{folder}/base")
    tokenizer.save_pretrained(f"{folder}/base")


def main(folder: str = "runs/translate", train: int = 800, epochs: float = 25) -> dict[str, float]:
    """Train all weights, save and reload them, and return their figures on dates that they never saw."""
    save_base(folder)
    # The day of the week comes before the first comma, and no model of this size can work it out.
    rows = [
        {"source": date, "target": ideal.split(", ", 1)[1]} for date, ideal in evals_rows("imperial_date_to_string")
    ]
    model, tokenizer = FastLanguageModel.from_pretrained(
        f"{folder}/base", full_finetuning=True, dtype="float32", use_gradient_checkpointing=False
    )
    args = SFTConfig(
        output_dir=folder,
        learning_rate=3e-3,
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=1,
        logging_steps=20,
        eval_split=0,
    )
    trainer = TaskTrainer(model, args, rows[:train], processing_class=tokenizer)
    print("\n".join(trainer.ledger.lines()))
    trainer.train()
    model.save_pretrained(f"{folder}/model")
    tokenizer.save_pretrained(f"{folder}/model")

    again, tokenizer = FastLanguageModel.from_pretrained(f"{folder}/model", dtype="float32", full_finetuning=True)
    figures = TaskTrainer(again, args, rows[:9], rows[train:], tokenizer).evaluate()
    written = again.generate(**tokenizer("2026-11-26", return_tensors="pt", return_token_type_ids=False))
    print(f"2026-11-26 is {tokenizer.decode(written[0], skip_special_tokens=True)}")
    print(f"exact match {figures['eval_exact_match']:.3f}")
    return figures


if __name__ == "__main__":
    main()
