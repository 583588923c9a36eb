"""A language of five tokens whose every reply can be listed: PPO's optimum is known in closed form."""

from itertools import product

import torch

import ppo
from model import LanguageModel, ModelConfig, ScalarModel, token_logprobs
from ppo import PPOConfig

EOS, LONGEST = 0, 5
PROMPTS = [[1], [2, 3], [4, 1, 2], [3, 3, 1, 4]]
# All that can be sampled: up to four tokens and EOS, or five without: 1,365.
REPLIES = ([[*words, EOS] for n in range(LONGEST) for words in product(range(1, 5), repeat=n)]
           + [list(words) for words in product(range(1, 5), repeat=LONGEST)])
SHAPE = ModelConfig(vocab_size=5, d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, d_ff=64, max_seq_len=12,
                    init="xavier",
                    tie_embeddings=False)
SCALE = 0.3
CONFIG = dict(batch_size=256, num_mini_batches=2, num_ppo_epochs=8, response_length=LONGEST, kl_coef=0.2,
              missing_eos_penalty=0.0, learning_rate=2e-3, max_steps=60, warmup_steps=2, compile=False,
              device="cpu",
              dtype="fp32")


def networks(seed):
    """Policy and reference (equal, at random), value model."""
    torch.manual_seed(seed)
    policy, reference, value_model = LanguageModel(SHAPE), LanguageModel(SHAPE), ScalarModel(SHAPE)
    with torch.no_grad():
        policy.lm_head.weight.mul_(0.7)                          # a reference with mild preferences
    reference.load_state_dict(policy.state_dict())
    return policy, reference.requires_grad_(False), value_model


def scorer(seed):
    """score(prompts, replies): each token has its worth, which the prompt's last token decides."""
    worth = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed)) * SCALE

    def score(prompts, replies):
        return torch.stack([worth[p[-1], r].sum() for p, r in zip(prompts, replies)])
    return score


@torch.no_grad()
def logprobs(model, prompt):
    """log p of each of REPLIES after a prompt, float64."""
    model.eval()
    ids = torch.tensor([prompt + reply + [EOS] * (LONGEST - len(reply)) for reply in REPLIES])
    mask = torch.tensor([[t < len(reply) for t in range(LONGEST)] for reply in REPLIES])
    return (token_logprobs(model(ids), ids)[:, len(prompt) - 1:].double() * mask).sum(1)


def objective(model, reference, score, kl_coef):
    """E[score] - kl_coef KL(model, reference), a mean over the prompts, by summing over all replies."""
    total = 0.0
    for prompt in PROMPTS:
        logp, ref = logprobs(model, prompt), logprobs(reference, prompt)
        scores = score([prompt] * len(REPLIES), REPLIES).double()
        total += (logp.exp() * (scores - kl_coef * (logp - ref))).sum().item()
    return total / len(PROMPTS)


def optimum(reference, score, kl_coef):
    """The largest objective there is: kl_coef log Z, reached by reference exp(score / kl_coef) / Z."""
    return sum((kl_coef * torch.logsumexp(logprobs(reference, prompt) + score(
        [prompt] * len(REPLIES), REPLIES).double() / kl_coef, 0)).item() for prompt in PROMPTS) / len(PROMPTS)


def share_of_the_way(seed, **changes):
    """How far the real ppo.train gets from the reference's objective (0) to the optimum's (1)."""
    config = PPOConfig(**CONFIG | dict(seed=seed) | changes)
    policy, reference, value_model = networks(seed)
    score, kl_coef = scorer(seed), CONFIG["kl_coef"]
    start, best = objective(reference, reference, score, kl_coef), optimum(reference, score, kl_coef)
    ppo.train(config, policy, reference, value_model, PROMPTS, score, EOS, log=lambda *_: None)
    return (objective(policy, reference, score, kl_coef) - start) / (best - start)
