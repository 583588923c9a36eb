"""An update of PPO beside the same work by Hugging Face's models: python tests/bench_ppo.py [rounds].

Four networks of 6 layers, width 384, vocabulary 4,096; 32 replies of 64 tokens to prompts of 32; 4 passes of
minibatches of 8; one thread, fp32, ours also in bf16 where the CPU computes in it. Theirs: generate with its
cache, log-probs of policy and reference, values, scores, then forward, backward and AdamW of policy and value
model for each minibatch, all without our code. Interleaved; seconds an update, medians.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import resource
import statistics
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers

import ppo
from batches import score_replies
from bench import PRESETS, BenchConfig, llama, model_config
from model import LanguageModel, ScalarModel
from optim import computes_bf16
from training import Ranks, autocast

B, PROMPT, REPLY, EPOCHS, MINI = 32, 32, 64, 4, 8
SETTINGS = BenchConfig(**PRESETS["6x384"])


def ours(dtype):
    """A function that does one update through ppo.train; no id ends a reply, so all have 64 tokens."""
    shape = model_config(SETTINGS)
    policy, reference, value_model, judge = (
        kind(shape) for kind in (LanguageModel, LanguageModel, ScalarModel, ScalarModel))
    config = ppo.PPOConfig(batch_size=B, num_ppo_epochs=EPOCHS, num_mini_batches=B // MINI,
                           response_length=REPLY, max_steps=1, warmup_steps=0, missing_eos_penalty=0,
                           device="cpu", learning_rate=1e-5)
    prompts, ranks = torch.randint(SETTINGS.vocab_size - 1, (B, PROMPT)).tolist(), Ranks(dtype=dtype)

    def score(prompts, replies):
        with autocast(ranks):
            return score_replies(judge, prompts, [reply[:-1] for reply in replies], 4095)

    def update():
        ppo.train(config, policy, reference, value_model, prompts, score, SETTINGS.vocab_size,
                  log=lambda *_: None, ranks=ranks)
    return update


def theirs():
    """The same work with transformers and plain torch."""
    policy, reference = llama(SETTINGS), llama(SETTINGS)
    scalar = transformers.LlamaForSequenceClassification
    value_model, judge = (scalar(transformers.LlamaConfig(**policy.config.to_dict() | {"num_labels": 1}))
                          for _ in range(2))
    for model in (policy, value_model):
        model.train()
    both = [*policy.parameters(), *value_model.parameters()]
    optimizer = torch.optim.AdamW(both, lr=1e-5, fused=True)
    prompts = torch.randint(SETTINGS.vocab_size, (B, PROMPT))

    def logprobs(model, ids):
        logits = model(ids, use_cache=False, logits_to_keep=REPLY + 1).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, ids[:, PROMPT:, None]).squeeze(-1)

    def values(model, ids):
        return model.score(model.model(ids, use_cache=False).last_hidden_state).squeeze(-1)[:, PROMPT - 1:-1]

    def update():
        with torch.no_grad():
            ids = policy.generate(prompts, do_sample=True, top_k=0, max_new_tokens=REPLY,
                                  min_new_tokens=REPLY, attention_mask=torch.ones_like(prompts))
            old, ref = (torch.cat([logprobs(model, part) for part in ids.split(MINI)])
                        for model in (policy, reference))
            was = torch.cat([values(value_model, part) for part in ids.split(MINI)])
            score = torch.cat([values(judge, part)[:, -1] for part in ids.split(MINI)])
            rewards = -0.1 * (old - ref)
            rewards[:, -1] += score
            returns = rewards.flip(1).cumsum(1).flip(1)
            advantages = returns - was
        for _ in range(EPOCHS):
            for rows in torch.randperm(B).split(MINI):
                optimizer.zero_grad()
                ratio = (logprobs(policy, ids[rows]) - old[rows]).exp()
                gain = torch.max(-advantages[rows] * ratio, -advantages[rows] * ratio.clamp(0.8, 1.2)).mean()
                (gain + 0.5 * (values(value_model, ids[rows]) - returns[rows]).square().mean()).backward()
                torch.nn.utils.clip_grad_norm_(both, 1.0)
                optimizer.step()
    return update


def main(rounds):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ways = {"ours, fp32": ours(torch.float32), "Hugging Face, fp32": theirs()}
    if computes_bf16(torch.device("cpu")):
        ways["ours, bf16"] = ours(torch.bfloat16)
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, update in ways.items():
            started = time.perf_counter()
            update()
            seconds[name].append(time.perf_counter() - started)
        print("  ".join(f"{name} {taken[-1]:.1f} s" for name, taken in seconds.items()), flush=True)
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    for name, taken in seconds.items():
        print(f"{name}: median {median[name]:.1f} s ({min(taken):.1f}-{max(taken):.1f}), "
              f"{median[name] / median['Hugging Face, fp32']:.2f} of Hugging Face's")
    print("peak memory of the process: "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10:.0f} MiB")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
