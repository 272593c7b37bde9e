"""The engine alone, in this process: the ceiling of `bench_gpu.py`. Takes its job as JSON and the file that gets {streams: tokens/s}."""

import json
import random
import sys
import time
from pathlib import Path

from vllm import LLM, SamplingParams


def main():
    job = json.loads(sys.argv[1])
    llm = LLM(job["model"], load_format="dummy", max_model_len=4096, max_num_seqs=256, gpu_memory_utilization=0.85)
    params = SamplingParams(max_tokens=job["output"], ignore_eos=True, temperature=0)
    rng, rates = random.Random(1), {}
    for streams in job["streams"]:
        for _ in range(2):  # the first round warms up
            prompts = [
                {"prompt_token_ids": [rng.randrange(300, job["vocab"] - 600) for _ in range(job["prompt"])]}
                for _ in range(streams)
            ]
            start = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
            rates[streams] = tokens / (time.perf_counter() - start)
    Path(sys.argv[2]).write_text(json.dumps(rates))


if __name__ == "__main__":
    main()
