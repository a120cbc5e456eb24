"""One stage of TRL's GRPOTrainer on an export of cropi's: python train.py EXPORT SAVE_TO [POLICY]."""

import sys
from pathlib import Path

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

from cropi.builtin import POLICY_DIR

export, save_to, policy = sys.argv[1], sys.argv[2], sys.argv[3] or str(POLICY_DIR)
sys.path.insert(0, export)
from reward import reward  # noqa: E402

trainer = GRPOTrainer(
    model=policy,
    reward_funcs=reward,
    args=GRPOConfig(
        output_dir=f"{save_to}-trainer",
        max_steps=8,
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=32,  # the run's collect.max_completion_length
        learning_rate=5e-5,
        lr_scheduler_type="constant",
        loss_type="dr_grpo",
        beta=0.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        log_completions=True,
        num_completions_to_print=0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    ),
    train_dataset=load_dataset("parquet", data_files=str(Path(export) / "train.parquet"), split="train"),
)
trainer.train()
trainer.save_model(save_to)
