"""transformers' generate on the same checkpoint and the same requests, as a process of its own.

Prints one JSON object. Greedy, end-of-sequence ignored. Static batches are left-padded to their longest prompt and run
to their longest output; only the tokens that were asked for count.

    python benchmarks/peer_transformers.py CHECKPOINT --threads 2
"""

import argparse
import json
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.workload import Item, mixed, single_stream


def load(directory: str, dtype: torch.dtype, attention: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=attention)
    return model.eval()


def generate(model: Any, items: list[Item]) -> float:
    """Seconds for one static batch, all outputs to the longest."""
    longest = max(len(item.prompt_ids) for item in items)
    ids = torch.tensor([[0] * (longest - len(item.prompt_ids)) + item.prompt_ids for item in items])
    mask = torch.tensor([[0] * (longest - len(i.prompt_ids)) + [1] * len(i.prompt_ids) for i in items])
    num_outputs = max(item.num_outputs for item in items)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=num_outputs, min_new_tokens=num_outputs, pad_token_id=0, eos_token_id=None
    )
    began = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=mask, generation_config=config)
    assert out.shape[1] == longest + num_outputs
    return time.perf_counter() - began


def static_rate(model: Any, items: list[Item], batch: int) -> float:
    """Asked-for tokens per second when `items` are served in static batches, sorted by output length (its best)."""
    ordered = sorted(items, key=lambda item: item.num_outputs)
    seconds = sum(generate(model, ordered[i : i + batch]) for i in range(0, len(ordered), batch))
    return sum(item.num_outputs for item in items) / seconds


def continuous_rate(directory: str, dtype: torch.dtype, items: list[Item]) -> float | str:
    """Tokens per second of transformers' own continuous batching, or why it does not run."""
    try:
        model = load(directory, dtype, "sdpa")
        config = GenerationConfig(
            do_sample=False, max_new_tokens=max(i.num_outputs for i in items), eos_token_id=-1, pad_token_id=0
        )
        began = time.perf_counter()
        outputs = model.generate_batch([item.prompt_ids for item in items], generation_config=config)
        seconds = time.perf_counter() - began
        generated = [len(output.generated_tokens) for output in outputs.values()]
        if len(generated) != len(items) or min(generated) == 0:
            return f"generated {generated} tokens"
        return sum(generated) / seconds
    except Exception as e:  # a peer's failure is a result, not ours to mend
        return f"{type(e).__name__}: {str(e).splitlines()[0][:120] if str(e) else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--vocab", type=int, required=True)
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 4, 16, 64])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    model = load(args.checkpoint, dtype, "sdpa")

    one = single_stream(args.vocab)
    generate(model, [Item(one.prompt_ids, 4)])
    prefill_s = min(generate(model, [Item(one.prompt_ids, 1)]) for _ in range(3))
    stream_s = min(generate(model, [one]) for _ in range(3))
    result: dict[str, Any] = {
        "ms_per_token": (stream_s - prefill_s) / (one.num_outputs - 1) * 1e3,
        "ttft_ms": prefill_s * 1e3,
        "static": {},
    }
    for concurrency in args.concurrency:
        items = mixed(concurrency, args.vocab)
        rates = {
            b: static_rate(model, items, b) for b in (1, 4, 8, 16, 32, 64) if b <= concurrency and b * 8 >= concurrency
        }
        best = max(rates, key=rates.__getitem__)
        result["static"][str(concurrency)] = {"batch": best, "tokens_per_s": rates[best]}
    result["continuous"] = {str(c): continuous_rate(args.checkpoint, dtype, mixed(c, args.vocab)) for c in (16,)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
