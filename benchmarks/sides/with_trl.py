"""TRL's side: its own trainers with LoRA, bf16 and plain AdamW; everything else as TRL has it."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from reward import share_of_vowels
from stopwatch import Stopwatch, start
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

PACKAGES = ("trl", "torch", "transformers", "peft", "accelerate", "datasets")
LOSS, ANSWER, TOKENS = "loss", "completions/mean_length", "num_tokens"


class Lap(TrainerCallback):
    """Ends a lap when a step has been logged, which each step is."""

    def __init__(self, watch: Stopwatch, tokens: int) -> None:
        self._watch, self._tokens, self._before = watch, tokens, 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **more: Any) -> None:
        """Called right after an optimizer step."""
        counted = logs.get(TOKENS, self._before)
        facts = {"tokens": counted - self._before if counted > self._before else self._tokens}
        self._before = counted
        names = {LOSS: "loss", ANSWER: "answer", "reward": "reward"}
        self._watch.lap(**facts, **{name: logs[key] for key, name in names.items() if key in logs})


def settings(job: dict[str, Any], folder: str) -> dict[str, Any]:
    """Arguments that all of TRL's configurations take."""
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": True,
        "learning_rate": job["lr"],
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "max_steps": job["warmup"] + job["steps"],
        "logging_steps": 1,
        "gradient_checkpointing": job["checkpointing"],
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
    }


def grpo(job: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    """Each step samples anew; an end token is never drawn, so that every answer has all its tokens."""
    from trl import GRPOConfig, GRPOTrainer

    rows, batch = job["prompts"] * job["group"], job["batch"]
    config = GRPOConfig(
        **common,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=rows // batch,
        num_generations=job["group"],
        max_completion_length=job["new_tokens"],
        generation_kwargs={"min_new_tokens": job["new_tokens"]},
        beta=job["beta"],
    )
    data = [{"prompt": [{"role": "user", "content": text}]} for text in job["questions"]]

    def vowels(completions: list[Any], **more: Any) -> list[float]:
        return [share_of_vowels(completion[0]["content"]) for completion in completions]

    return {"kind": GRPOTrainer, "args": config, "train_dataset": data, "reward_funcs": vowels}


def sft(job: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    """Sequences padded to the longest of the step, or packed to TRL's default length, about as many tokens a step."""
    from trl import SFTConfig, SFTTrainer

    steps = job["sequences"] if job["packing"] else job["sequences"][:1]
    data = [{"input_ids": ids} for step in steps for ids in step]
    batch = job["batch"] or len(data)
    if job["packing"]:
        batch = max(1, round(job["tokens"] / SFTConfig.max_length))
    config = SFTConfig(**common, per_device_train_batch_size=batch, packing=job["packing"])
    return {"kind": SFTTrainer, "args": config, "train_dataset": data}


def dpo(job: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    """The reference is the model without its adapter, computed in each step."""
    from trl import DPOConfig, DPOTrainer

    data = [{name: pair[name] for name in ("prompt", "chosen", "rejected")} for pair in job["pairs"]]
    accumulate = len(data) // job["batch"]
    config = DPOConfig(
        **common, per_device_train_batch_size=job["batch"], gradient_accumulation_steps=accumulate, beta=job["beta"]
    )
    return {"kind": DPOTrainer, "args": config, "train_dataset": data}


def main() -> None:
    """Train until the stopwatch ends the process."""
    job, watch = start(PACKAGES)
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16)
    adapter = LoraConfig(
        r=job["rank"],
        lora_alpha=job["alpha"],
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = {"grpo": grpo, "sft": sft, "dpo": dpo}[job["kind"]](job, settings(job, folder))
        kind = arguments.pop("kind")
        arguments["train_dataset"] = Dataset.from_list(arguments["train_dataset"])
        tokenizer = AutoTokenizer.from_pretrained(job["model"])
        lap = Lap(watch, job["tokens"])
        trainer = kind(model=model, processing_class=tokenizer, peft_config=adapter, callbacks=[lap], **arguments)
        watch.note(batch=trainer.args.per_device_train_batch_size)
        trainer.train()


if __name__ == "__main__":
    main()
