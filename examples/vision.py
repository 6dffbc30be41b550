"""Teach a vision-language model to name colours in its own words, on images made here.

    python examples/vision.py google/gemma-3-4b-it
    python examples/vision.py FOLDER_OF_A_MODEL --steps 40

Only the pixels tell the answer, so that the share of right answers on unseen images says whether the model looks.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

from PIL import Image

from tunesmith import FastVisionModel, SFTConfig, SFTTrainer, VisionDataCollator

COLOURS = {"ruby": (220, 20, 30), "jade": (20, 200, 60), "azure": (20, 60, 230)}


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Return conversations about one image each."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        name = draw.choice(list(COLOURS))
        shade = tuple(value + draw.randint(-20, 15) for value in COLOURS[name])
        question = [{"type": "image", "image": Image.new("RGB", (64, 64), shade)}, {"type": "text", "text": "colour?"}]
        answer = [{"type": "text", "text": name}]
        made.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return made


def answer(model: Any, processor: Any, row: dict[str, Any]) -> str:
    """Return what the model says of the image of a row."""
    prompt = processor.apply_chat_template(
        row["messages"][:1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    end = processor.tokenizer.eos_token_id
    out = model.generate(**prompt, max_new_tokens=8, do_sample=False, eos_token_id=end)
    return processor.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    """Train, save, load again and ask about unseen images."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model", help="folder or hub id of a vision-language model")
    options.add_argument("--steps", type=int, default=30)
    options.add_argument("--rate", type=float, default=2e-4)
    options.add_argument("--dtype", help="float32 or bfloat16; left out, the hardware decides")
    options.add_argument("--output", default="runs/colours")
    asked = options.parse_args()

    model, processor = FastVisionModel.from_pretrained(asked.model, dtype=asked.dtype)
    model = FastVisionModel.get_peft_model(
        model, r=16, lora_alpha=16, finetune_vision_layers=True, finetune_language_layers=True
    )
    args = SFTConfig(
        output_dir=asked.output, max_steps=asked.steps, learning_rate=asked.rate, per_device_train_batch_size=8,
        gradient_accumulation_steps=1, eval_split=0, save_strategy="no",
    )  # fmt: skip
    trainer = SFTTrainer(model, args, rows(64, seed=0), data_collator=VisionDataCollator(model, processor))
    trainer.train()
    model.save_pretrained(f"{asked.output}/adapter")
    processor.save_pretrained(f"{asked.output}/adapter")

    model, processor = FastVisionModel.from_pretrained(f"{asked.output}/adapter", dtype=asked.dtype)
    FastVisionModel.for_inference(model)
    unseen = rows(12, seed=1)
    right = sum(answer(model, processor, row) == row["messages"][1]["content"][0]["text"] for row in unseen)
    print(f"{right} of {len(unseen)} unseen images named rightly")


if __name__ == "__main__":
    main()
