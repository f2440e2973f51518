"""A loop as many tutorials write it: Hugging Face Trainer, a Dataset of pictures and a collate function.

python hand_written.py SETTINGS.json

`prepare_model_for_kbit_training` also casts the vision tower to float32. That is part of such a loop.
"""

from typing import Any

import torch
from common import IGNORED, Clock, Record, Settings, in_order, load_model, load_processor, lora
from peft import get_peft_model, prepare_model_for_kbit_training
from PIL import Image
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments


class Foods(Dataset):
    """One item per picture, with the processor's output and the labels of the answer."""

    def __init__(self, settings: Settings, processor: Any):
        self.settings, self.processor = settings, processor
        self.rows = settings.read_rows()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        row = self.rows[i]
        image = Image.open(row["image"]).convert("RGB")
        question = [
            {"role": "system", "content": [{"type": "text", "text": self.settings.system}]},
            {
                "role": "user",
                "content": [{"type": "image", "image": image}, {"type": "text", "text": self.settings.prompt}],
            },
        ]
        answer = {"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]}
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        asked = self.processor.apply_chat_template(question, add_generation_prompt=True, **options)
        item = self.processor.apply_chat_template([*question, answer], **options)
        labels = item["input_ids"].clone()
        labels[:, : asked["input_ids"].shape[1]] = IGNORED
        return {**item, "labels": labels}


def collate(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return a batch of one sample. Most such loops train with one sample at a time, so that nothing must be padded."""
    [item] = items
    return item


def main() -> None:
    settings = Settings.read()
    record = Record(settings)
    processor = load_processor(settings)
    recompute = {"use_gradient_checkpointing": settings.recompute}
    if settings.recompute:
        recompute["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    model = prepare_model_for_kbit_training(load_model(settings), **recompute)
    torch.manual_seed(settings.seed)  # the adapter's first weights are the same in all trainers
    trainer = in_order(Trainer, record)(
        model=get_peft_model(model, lora(settings)),
        args=TrainingArguments(**settings.arguments()),
        train_dataset=Foods(settings, processor),
        data_collator=collate,
        callbacks=[Clock(record)],
    )
    trainer.train()
    record.write(trainer.model)


if __name__ == "__main__":
    main()
