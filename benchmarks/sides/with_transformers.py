"""transformers' side: `generate` for a padded batch of prompts."""

from __future__ import annotations

import torch
from stopwatch import start
from transformers import AutoModelForCausalLM

PACKAGES = ("transformers", "torch")


def main() -> None:
    """Sample until the stopwatch ends the process."""
    job, watch = start(PACKAGES)
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16).eval()
    settings = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_new_tokens": job["new_tokens"],
        "max_new_tokens": job["new_tokens"],
        "num_return_sequences": job["group"],
        "pad_token_id": model.config.pad_token_id or 0,
    }
    torch.manual_seed(0)
    for ids in job["prompt_ids"]:
        prompts = torch.tensor(ids)
        with torch.inference_mode():
            out = model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)
        watch.lap(tokens=out[:, prompts.shape[1] :].numel())


if __name__ == "__main__":
    main()
