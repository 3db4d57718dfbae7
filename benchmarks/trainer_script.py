"""What people write instead: one LoRA run with transformers' Trainer and peft. `benchmarks/cells.py` runs it.

`--tuned` leaves out dropout, groups rows by length and scores in batches of 64; otherwise what the libraries do by
default. Prints the accuracies on val and test as JSON.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)


def main() -> None:
    """Trains and scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the base model")
    parser.add_argument("--data", required=True, help="folder with train.csv, val.csv and test.csv: text, label")
    parser.add_argument("--to", required=True, help="folder for what the Trainer writes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--max-length", type=int, required=True)
    parser.add_argument("--tuned", action="store_true")
    options = parser.parse_args()
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    names = ("train", "val", "test")
    data = load_dataset("csv", data_files={name: f"{options.data}/{name}.csv" for name in names}, cache_dir=options.to)
    labels = sorted(set(data["train"]["label"]))
    data = data.map(
        lambda rows: {
            **tokenizer(rows["text"], truncation=True, max_length=options.max_length),
            "labels": [labels.index(label) for label in rows["label"]],
        },
        batched=True,
        remove_columns=["text", "label"],
    )
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if options.tuned else {}
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=len(labels), **no_dropout)
    lora = LoraConfig(
        task_type="SEQ_CLS",
        r=8,
        lora_alpha=16,
        lora_dropout=0.0 if options.tuned else 0.1,
        target_modules=["query", "value"],
    )
    arguments = TrainingArguments(
        output_dir=options.to,
        seed=options.seed,
        num_train_epochs=1,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=64 if options.tuned else 8,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(0.06 * len(data["train"]) / 8),
        weight_decay=0.01,
        max_grad_norm=1.0,
        train_sampling_strategy="group_by_length" if options.tuned else "random",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trainer = Trainer(
        model=get_peft_model(model, lora),
        args=arguments,
        train_dataset=data["train"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda found: {"accuracy": float((np.argmax(found[0], axis=-1) == found[1]).mean())},
    )
    trainer.train()
    scores = {name: trainer.evaluate(data[name])["eval_accuracy"] for name in names[1:]}
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
