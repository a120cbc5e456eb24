"""The script `grpo.py` with a curriculum: an import and an argument are all that differs."""

from datasets import Dataset
from trl import GRPOConfig

from cropi.builtin import POLICY_DIR, generate
from cropi.trl import CurriculumTrainer, Selector

FAMILIES = ["sum", "parity", "count", "machine", "maximum", "shell"]
rows = [row for family in FAMILIES for row in generate(family, split="train", count=40, seed=0, label_noise=0.5)]
dataset = Dataset.from_list([{"prompt": row["prompt"], "answer": row["answer"]} for row in rows])
held_out = Dataset.from_list(
    [
        {"prompt": row["prompt"], "answer": row["answer"]}
        for row in generate("sum", split="validation", count=24, seed=0)
    ]
)


def right(completions, answer, **_):
    """1 where the text after `answer` is the recorded one."""
    return [float(c.rpartition("answer ")[2].strip() == a) for c, a in zip(completions, answer, strict=True)]


def main():
    trainer = CurriculumTrainer(
        model=str(POLICY_DIR),
        reward_funcs=right,
        args=GRPOConfig(
            output_dir="curriculum",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=64,
            num_generations=8,
            max_completion_length=24,
            max_steps=24,
            learning_rate=5e-5,
            report_to=[],
            logging_steps=4,
            save_strategy="no",
        ),
        train_dataset=dataset,
        selector=Selector(validation=held_out),
    )
    trainer.train()


if __name__ == "__main__":
    main()
