"""The tutorial's own PPO, which many paste: what it does instead of learning.

ppo.py holds only the right one. Its loss is -(reward - mean log-prob) * mean log-prob, both means over the
whole vocabulary: no ratio, no clip, no KL, no values, no mask of the reply, whatever token was sampled.
"""

import math

import torch

import toy
from generate import generate


def article_loss(logits, rewards):
    """logits (B, T, V), rewards (B,): what the tutorial steps on."""
    mean_logprob = logits.log_softmax(-1).mean((1, 2))
    return -((rewards - mean_logprob.detach()) * mean_logprob).mean()


def test_its_gradient_does_not_know_what_was_sampled():
    """-A (1/V - p) / T at every position: a push towards the uniform distribution if A > 0, else away."""
    logits = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0),
                         dtype=torch.float64).requires_grad_()
    rewards = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    article_loss(logits, rewards).backward()
    advantage = rewards - logits.detach().log_softmax(-1).mean((1, 2))
    wanted = -advantage[:, None, None] * (1 / 7 - logits.detach().softmax(-1)) / 4 / 3
    torch.testing.assert_close(logits.grad, wanted, rtol=1e-10, atol=1e-14)


def sharp():
    """The toy's policy with strong preferences, so that flattening shows."""
    policy, reference, _ = toy.networks(0)
    with torch.no_grad():
        for model in (policy, reference):
            model.lm_head.weight.mul_(4)
    return policy, reference


def mean_entropy(model):
    logits = torch.cat([model(torch.tensor([prompt]))[:, -1] for prompt in toy.PROMPTS])
    return torch.distributions.Categorical(logits=logits).entropy().mean().item()


def test_it_flattens_the_policy_where_ppo_reaches_the_optimum():
    """test_ppo.py has the other half: the same score, the same network, above 98% of the way."""
    policy, reference = sharp()
    score, optimizer = toy.scorer(0), torch.optim.AdamW(policy.parameters(), lr=3e-3)
    start, best = (f(reference, score, 0.2) for f in (lambda r, s, k: toy.objective(r, r, s, k), toy.optimum))
    before = mean_entropy(policy)
    for step in range(60):
        prompts = toy.PROMPTS * 16
        replies = generate(policy, prompts, 5, stop_ids=(toy.EOS,), seeds=[step << 8 | i for i in range(64)])
        rewards = score(prompts, replies)
        rows = [p + r for p, r in zip(prompts, replies)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [toy.EOS] * (width - len(row)) for row in rows])
        policy.train()
        loss = article_loss(policy(ids), rewards + 3)               # a reward model's marks are positive
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    policy.eval()
    assert before < 0.9 * math.log(5) and mean_entropy(policy) > 0.97 * math.log(5)
    reached = (toy.objective(policy, reference, score, 0.2) - start) / (best - start)
    assert reached < 0.3
