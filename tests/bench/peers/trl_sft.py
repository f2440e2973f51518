"""TRL's SFTTrainer, as its guide for vision-language models uses it: python trl_sft.py SETTINGS.json."""

import datasets
import torch
from common import Clock, Record, Settings, in_order, load_model, load_processor, lora
from trl import SFTConfig, SFTTrainer


def main() -> None:
    settings = Settings.read()
    record = Record(settings)
    rows = [
        {
            "images": [row["image"]],
            "prompt": [
                {"role": "system", "content": settings.system},
                {"role": "user", "content": settings.prompt},
            ],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in settings.read_rows()
    ]
    data = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    model = load_model(settings)
    torch.manual_seed(settings.seed)  # the adapter's first weights are the same in all trainers
    trainer = in_order(SFTTrainer, record)(
        model=model,
        args=SFTConfig(**settings.arguments(), max_length=None, completion_only_loss=True),
        train_dataset=data,
        processing_class=load_processor(settings),
        peft_config=lora(settings),
        callbacks=[Clock(record)],
    )
    trainer.train()
    record.write(trainer.model)


if __name__ == "__main__":
    main()
