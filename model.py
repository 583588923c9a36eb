"""A Llama-style decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU (Touvron et al. 2023).

Shapes are written with one letter each:
  B batch   T positions in this call   S positions in the cache, S >= T   V vocab_size   L n_layers
  D d_model   F d_ff   H n_heads   G n_kv_heads   K head_dim
Parameter names are Hugging Face Llama's (Qwen3's where qk_norm is on), so the state dict is the export.
No training here: optimisers, precision and ranks are in optim.py and training.py.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from cli import UserError, option

IGNORE_INDEX = -100                 # a target that is not to be learnt
MAX_LOGITS = 2 ** 25                # logits held at once: 128 MiB in fp32
CACHED_LOGITS = 2 ** 20             # the same on a CPU, whose cache they fit
MIN_CHUNK = 256                     # tokens whose logits are made at once at least: fewer make slow products
QUERY_BLOCK = 128                   # queries whose scores `attend` makes at once
CACHE_BLOCK = 32                    # positions by which a KVCache grows
INITS = ("normal", "xavier", "he")


@dataclass
class ModelConfig:
    """The shape of a model."""
    vocab_size: int = option(4096, "tokens in the vocabulary, the four specials included; "
                                   "0 = the tokenizer's")
    d_model: int = option(192, "width of the residual stream")
    n_layers: int = option(6, "blocks")
    n_heads: int = option(6, "query heads")
    n_kv_heads: int = option(2, "key-value heads, shared by n_heads / n_kv_heads query heads each")
    head_dim: int = option(0, "width of a head; 0 = d_model / n_heads")
    d_ff: int = option(512, "width of the SwiGLU's inside")
    max_seq_len: int = option(256, "longest input, tokens")
    rope_theta: float = option(10_000.0, "base of the rotary angles")
    norm_eps: float = option(1e-5, "added to the mean square in RMSNorm")
    tie_embeddings: bool = option(True, "one matrix for embedding and head")
    qk_norm: bool = option(False, "RMSNorm on queries and keys, as in Qwen3")
    dropout: float = option(0.0, "share of the embedding and of each block's outputs set to 0 in training")
    init: str = option("normal", "weights at the start: normal (sd 0.02), xavier or he")

    def __post_init__(self):
        for name in ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "max_seq_len"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} must be at least 1")
        if not self.head_dim:
            if self.d_model % self.n_heads:
                raise UserError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}; "
                                "change one or give --head_dim")
            self.head_dim = self.d_model // self.n_heads
        if self.n_heads % self.n_kv_heads:
            raise UserError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim < 2 or self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} must be even and at least 2: "
                            "rotary positions turn pairs")
        if not self.rope_theta > 0:
            raise UserError(f"rope_theta {self.rope_theta} must be above 0")
        if not self.norm_eps >= 0:
            raise UserError(f"norm_eps {self.norm_eps} must be 0 or more")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout {self.dropout} is not in [0, 1)")
        if self.init not in INITS:
            raise UserError(f"init {self.init!r} is unknown; choose among {', '.join(INITS)}")


def rotary_angles(config):
    """Cosine and sine of position * theta^(-2i/K), both (max_seq_len, K/2) (Su et al. 2021, eq. 15)."""
    K = config.head_dim
    frequency = config.rope_theta ** (-torch.arange(0, K, 2, dtype=torch.float32) / K)
    angle = torch.outer(torch.arange(config.max_seq_len, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + K/2]) by its angle. x (B, any, T, K); cos, sin (B or 1, 1, T, K/2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).type_as(x)


class KVCache:
    """Keys and values of the tokens read so far, so that a new token costs one position and not all of them.

    Rows may differ in length: a batch of prompts is padded on the RIGHT, the pads' keys lie behind a row's
    length where no query looks, and the row's next tokens overwrite them. After each forward the caller says
    how many of the T positions were real, with `advance`. It grows by whole blocks and is read to its end, so
    that a layer's keys lie in one piece, which products would copy otherwise.
    """

    def __init__(self, config, batch_size, max_len, device=None, dtype=torch.float32):
        if max_len > config.max_seq_len:
            raise UserError(f"{max_len} tokens do not fit into max_seq_len {config.max_seq_len}; "
                            "shorten the prompt or ask for fewer new tokens")
        self.max_len = max_len
        shape = (config.n_layers, batch_size, config.n_kv_heads, 0, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)                  # (L, B, G, S, K)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)     # (B,) real tokens a row
        self.longest = 0                                                            # max(lengths), no sync

    def positions(self, T):
        """Positions of the next T tokens of each row, (B, T), for which there is room afterwards."""
        blocks = -(-(self.longest + T) // CACHE_BLOCK)
        self.grow(min(blocks * CACHE_BLOCK, self.max_len))
        return self.lengths[:, None] + torch.arange(T, device=self.lengths.device)

    def grow(self, S):
        """Have S positions, or as many as there are."""
        more = max(0, S - self.keys.shape[3])
        self.keys, self.values = (F.pad(x, (0, 0, 0, more)) if more else x for x in (self.keys, self.values))

    def layers(self):
        """The keys and values of each layer, L pairs (B, G, S, K), in which a layer stores its new ones."""
        return zip(self.keys, self.values)

    def advance(self, n):
        """Count n more real tokens: an int, or (B,) where rows differ."""
        self.lengths += n                               # in place: a captured step reads them where they are
        self.longest = self.longest + n if isinstance(n, int) else int(self.lengths.max())

    def keep(self, rows):
        """Drop all rows but these, (b,) indices."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.lengths = self.lengths[rows]
        self.longest = int(self.lengths.max())

    def join(self, other):
        """Take in the rows of another cache, behind the own ones."""
        self.max_len = max(self.max_len, other.max_len)
        self.grow(other.keys.shape[3])
        other.grow(self.keys.shape[3])
        self.keys, self.values = (torch.cat(pair, dim=1) for pair in ((self.keys, other.keys),
                                                                      (self.values, other.values)))
        self.lengths = torch.cat([self.lengths, other.lengths])
        self.longest = max(self.longest, other.longest)


def work_type(weight):
    """The dtype in which a product with this weight is made here: autocast's, or the weight's own."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def adds_up(n_rows, device):
    """Whether a product is written as multiply and add: where it has one row, compiled for a CPU.

    That reads the matrix twice as fast as torch's product does (LOG.md), and reading is what it costs.
    """
    return n_rows == 1 and device.type == "cpu" and torch.compiler.is_compiling()


def linear(x, weight):
    """x @ weight', for x (..., n_in) and weight (n_out, n_in)."""
    if adds_up(x.numel() // x.shape[-1], x.device):
        return (weight * x.flatten()).sum(-1).to(work_type(weight)).view(*x.shape[:-1], -1)
    return F.linear(x, weight)


class Linear(nn.Linear):
    """A matrix without bias; see linear."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return linear(x, self.weight)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019), cast once for all products that read it."""

    def forward(self, x):
        y = F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)
        return y.to(work_type(self.weight))


def skips_blocks(head_dim, device):
    """Whether attention leaves out what other documents of a row would fill: compiled, on a GPU.

    There flex attention (Dong et al. 2024) makes one kernel of the mask and the product; a dense mask would
    be read by every head, and keep torch from its fastest kernels. Heads of less than 16 it does not take.
    """
    return device.type == "cuda" and torch.compiler.is_compiling() and head_dim >= 16


def attend(q, k, v, mask):
    """softmax(q k' / sqrt(K)) v for q (B, H, T, K) and k, v (B, G, S, K) (Vaswani et al. 2017, eq. 1).

    mask (B, 1, T, S), or a BlockMask: the keys that a query sees; none = those up to itself, and S is T. By
    torch's kernels, but for bf16 on a CPU: there plain products, block by block of queries, take half of
    their time (LOG.md).
    """
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    if adds_up(q.shape[0] * q.shape[2], q.device):
        scores = (q.unflatten(1, (k.shape[1], -1)) * k[:, :, None]).sum(-1) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)              # (1, G, H / G, S)
        return (weights[..., None] * v[:, :, None]).sum(-2).flatten(1, 2)[:, :, None]
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                              enable_gqa=True)
    B, H, T, K = q.shape
    G, S = k.shape[1:3]
    if mask is None:
        here = torch.arange(T, device=q.device)
        mask = (here <= here[:, None])[None, None]
    bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf)[:, :, None]  # (B, 1, 1, T, S)
    q = (q * K ** -0.5).unflatten(1, (G, H // G))                               # (B, G, H / G, T, K)
    k, v = k[:, :, None], v[:, :, None]                                         # (B, G, 1, S, K)
    blocks = []
    for start in range(0, T, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, T)
        seen = S - T + end                                                  # no query looks behind its block
        scores = q[..., start:end, :] @ k[..., :seen, :].mT + bias[..., start:end, :seen]
        blocks.append(scores.softmax(-1) @ v[..., :seen, :])                # (B, G, H / G, block, K)
    return torch.cat(blocks, dim=-2).flatten(1, 2)


class Attention(nn.Module):
    """Causal self-attention in which H query heads share G key-value heads (Ainslie et al. 2023)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, H, G, K = config.d_model, config.n_heads, config.n_kv_heads, config.head_dim
        self.q_proj = Linear(D, H * K)
        self.k_proj = Linear(D, G * K)
        self.v_proj = Linear(D, G * K)
        self.o_proj = Linear(H * K, D)
        self.q_norm = RMSNorm(K, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(K, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, mask, cache, positions):
        B, T, D = x.shape
        K = self.config.head_dim
        q = self.q_norm(self.q_proj(x).view(B, T, -1, K)).transpose(1, 2)               # (B, H, T, K)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, K)).transpose(1, 2)               # (B, G, T, K)
        v = self.v_proj(x).view(B, T, -1, K).transpose(1, 2)                            # (B, G, T, K)
        q, k, v = rotate(q, cos, sin), rotate(k, cos, sin), v.type_as(q)
        if cache is not None:
            rows = torch.arange(B, device=x.device)[:, None]
            for stored, new in zip(cache, (k, v)):
                stored[rows, :, positions] = new.transpose(1, 2).to(stored.dtype)       # (B, T, G, K)
            k, v = (stored.type_as(q) for stored in cache)                              # (B, G, S, K)
        y = attend(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))                         # (B, T, D)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, eq. 6)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.d_model, config.d_ff)
        self.up_proj = Linear(config.d_model, config.d_ff)
        self.down_proj = Linear(config.d_ff, config.d_model)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then SwiGLU, each behind an RMSNorm and added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, *attention_args):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), *attention_args))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Transformer(nn.Module):
    """From ids to the normalised residual stream: what language, reward and value models share."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        cos, sin = rotary_angles(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids, doc_ids=None, cache=None):
        """Give the normalised stream (B, T, D) for ids (B, T).

        doc_ids: (B, T), equal within a document: attention stays inside each and its positions start at 0.
        cache: a KVCache; ids are then the next T tokens of each row.
        """
        return self.norm(self.through_blocks(ids, doc_ids, cache))

    def through_blocks(self, ids, doc_ids=None, cache=None, block=None):
        """The same before its norm; block: Block.forward compiled, if it is to be run so."""
        if ids.shape[1] > self.config.max_seq_len:
            raise UserError(f"{ids.shape[1]} tokens do not fit into max_seq_len {self.config.max_seq_len}")
        positions, mask = self.positions_and_mask(ids, doc_ids, cache)
        cos, sin = self.cos[positions].unsqueeze(-3), self.sin[positions].unsqueeze(-3)  # (B or 1, 1, T, K/2)
        x = self.dropout(self.embed_tokens(ids))                                         # (B, T, D)
        for layer, stored in zip(self.layers, cache.layers() if cache else [None] * len(self.layers)):
            args = x, cos, sin, mask, stored, positions
            x = block(layer, *args) if block else layer(*args)
        return x

    def positions_and_mask(self, ids, doc_ids, cache):
        """Positions (B or 1, T), and which key each query may see: see `attend`."""
        T = ids.shape[1]
        if cache is not None:
            positions = cache.positions(T)
            keys = torch.arange(cache.keys.shape[3], device=ids.device)
            return positions, (keys <= positions[:, :, None])[:, None]
        here = torch.arange(T, device=ids.device)[None]
        if doc_ids is None:
            return here, None
        first = F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0))                # True where a document starts
        start = (here * first).cummax(dim=1).values
        if skips_blocks(self.config.head_dim, ids.device):
            return here - start, create_block_mask(
                lambda b, h, query, key: (query >= key) & (doc_ids[b, query] == doc_ids[b, key]),
                len(ids), None, T, T, device=ids.device)
        mask = (doc_ids[:, :, None] == doc_ids[:, None, :]) & (here.mT >= here)
        return here - start, mask[:, None]


class LanguageModel(nn.Module):
    """The stream read by a linear head: logits of the next token, or with targets the loss."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Transformer(config)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.d_model, config.vocab_size)
        init_weights(self, config)

    @property
    def head_weight(self):
        """The matrix of the head, (V, D)."""
        return self.model.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    def head(self, stream):
        """Logits (..., V) of the stream (..., D)."""
        return linear(stream, self.head_weight)

    def forward(self, ids, targets=None, doc_ids=None, cache=None):
        """Give logits (B, T, V); with targets (B, T) the (sum, count) of token_loss instead.

        Both come from one forward because the trained one must go through the DDP or FSDP wrapper.
        """
        stream = self.model(ids, doc_ids, cache)
        if targets is None:
            return self.head(stream)
        total = HeadLoss.apply(stream.flatten(0, 1), self.head_weight, targets.flatten())
        return total, (targets != IGNORE_INDEX).sum()


class ScalarModel(nn.Module):
    """One number a position, from the same stream: a reward model reads the last one, a value model all.

    With a likelihood_coef it keeps the language head, too, and the score of a reply is its last number plus
    that times the mean log-probability of its tokens (Meng et al. 2024, eq. 4). How likely a token was is
    known at the token before it; of that a scalar head learns next to nothing from a few thousand judgements
    (LOG.md).
    """

    def __init__(self, config, likelihood_coef=0.0):
        super().__init__()
        self.config, self.likelihood_coef = config, likelihood_coef
        self.model = Transformer(config)
        self.score = Linear(config.d_model, 1)
        if likelihood_coef and not config.tie_embeddings:
            self.lm_head = Linear(config.d_model, config.vocab_size)
        self.register_buffer("score_mean", torch.tensor(0.0))
        self.register_buffer("score_std", torch.tensor(1.0))
        init_weights(self, config)

    def forward(self, ids, doc_ids=None, targets=None):
        """Give (B, T): the head's output, normalised by the buffers, in fp32.

        targets (B, T), needed with a likelihood_coef: the next token where that is of a reply, else
        IGNORE_INDEX. After the last one of a document its replies' likelihood is added.
        """
        stream = self.model(ids, doc_ids)
        raw = self.score(stream).squeeze(-1).float()
        if self.likelihood_coef:
            if targets is None:
                raise ValueError(f"likelihood_coef {self.likelihood_coef:g} needs to know which tokens are "
                                 "the reply; give targets (or score_response reply_lengths)")
            raw = raw + self.likelihood_coef * self.mean_logprobs(stream, doc_ids, targets)
        return (raw - self.score_mean) / self.score_std

    def mean_logprobs(self, stream, doc_ids, targets):
        """Give (B, T): at a document's last target the mean log-probability of all, nats; elsewhere 0."""
        said = targets != IGNORE_INDEX
        row, t = said.nonzero(as_tuple=True)
        head = self.model.embed_tokens if self.config.tie_embeddings else self.lm_head
        logprobs = -F.cross_entropy(F.linear(stream[row, t], head.weight).float(), targets[row, t],
                                    reduction="none")
        doc = row if doc_ids is None else row * (doc_ids.max() + 1) + doc_ids[row, t]
        _, number, counts = doc.unique_consecutive(return_inverse=True, return_counts=True)
        means = torch.zeros(len(counts), device=stream.device).index_add(0, number, logprobs) / counts
        last = counts.cumsum(0) - 1
        return torch.zeros(said.shape, device=stream.device).index_put((row[last], t[last] + 1), means)

    def score_response(self, ids, lengths, reply_lengths=None):
        """Give (B,): the number at each row's last real token; ids (B, T) padded right, lengths (B,).

        reply_lengths (B,), needed with a likelihood_coef: how many of them are the reply, its end included.
        """
        targets = None
        if reply_lengths is not None:
            at = torch.arange(1, ids.shape[1] + 1, device=ids.device)           # place of the next token
            reply = (at >= (lengths - reply_lengths)[:, None]) & (at < lengths[:, None])
            targets = ids.roll(-1, 1).where(reply, IGNORE_INDEX)
        return self(ids, targets=targets).gather(1, (lengths - 1)[:, None]).squeeze(1)


@torch.no_grad()
def init_weights(model, config):
    """Set every weight, drawing from torch's global generator.

    embedding, tied or not          N(0, 0.02) (Radford et al. 2019)
    matrices, (fan_out, fan_in)     normal N(0, 0.02); xavier N(0, sqrt(2 / (fan_in + fan_out))) (Glorot &
                                    Bengio 2010, eq. 16); he N(0, sqrt(2 / fan_in)) (He et al. 2015, eq. 10)
    o_proj and down_proj            the same / sqrt(2 L): 2 L of them add up in the stream (Radford et al.
                                    2019); xavier and he make branches of size 1, so also * 0.02, the
                                    embedding's size
    score                           N(0, 1 / sqrt(D + 1)) (Stiennon et al. 2020)
    norms                           1
    """
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            weight.fill_(1.0)
            continue
        fan_out, fan_in = weight.shape
        sd = {"normal": 0.02, "xavier": math.sqrt(2 / (fan_in + fan_out)),
              "he": math.sqrt(2 / fan_in)}[config.init]
        if "embed_tokens" in name:
            sd = 0.02
        elif name == "score.weight":
            sd = 1 / math.sqrt(config.d_model + 1)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            sd *= (1 if config.init == "normal" else 0.02) / math.sqrt(2 * config.n_layers)
        weight.normal_(0.0, sd)


def token_loss(logits, targets):
    """Sum of -log p in nats over the targets to learn, and how many they are.

    logits (..., V); targets (...), already shifted, IGNORE_INDEX where nothing is to be learnt. A sum and a
    count, not a mean: the caller divides by the count of the WHOLE batch (all micro-batches, all ranks), so
    how a batch is cut up never changes the gradient.
    """
    total = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORE_INDEX,
                            reduction="sum")
    return total, (targets != IGNORE_INDEX).sum()


def chunk_of_tokens(vocab_size, device):
    """Tokens whose logits HeadLoss makes at once."""
    return max(MIN_CHUNK, (CACHED_LOGITS if device.type == "cpu" else MAX_LOGITS) // vocab_size)


@torch.compiler.nested_compile_region
def chunk_loss(x, w, targets, counts):
    """One chunk of HeadLoss: (loss, its gradient by x, its gradient by w); compiled once for all chunks.

    x (n, D), w (V, D); targets (n, 1); counts (n, 1): False where nothing is to be learnt.
    """
    wide = torch.promote_types(w.dtype, torch.float32)              # fp32; float64 in tests
    logp = F.linear(x, w).to(wide).log_softmax(-1)                  # (n, V)
    total = -(logp.gather(1, targets) * counts).sum()
    d_logits = logp.exp_().scatter_add_(1, targets, -torch.ones_like(logp[:, :1])).to(x.dtype)
    return total, (d_logits @ w) * counts, d_logits.mT @ (x * counts)


class HeadLoss(torch.autograd.Function):
    """The sum of token_loss(F.linear(stream, weight), targets), whose logits never exist all at once.

    stream (N, D), weight (V, D), targets (N,). What backward needs of a logit is its softmax, so the gradient
    is made while a chunk's logits are still in the cache, and backward only scales it (Hsu et al. 2024, Liger
    Kernel): no logits are stored, and none made twice.
    """

    @staticmethod
    def forward(ctx, stream, weight, targets):
        x, w = (tensor.to(work_type(weight)) for tensor in (stream, weight))
        # Positions with nothing to learn are left out; a compiled graph, whose shapes are fixed, reads all.
        learnt, eager = targets != IGNORE_INDEX, not torch.compiler.is_compiling()
        if eager:
            x, targets = x[learnt], targets[learnt]
        counts = (targets != IGNORE_INDEX)[:, None]
        targets = targets[:, None].where(counts, 0)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        d_stream, d_weight = torch.empty_like(x), torch.zeros_like(weight)
        size = chunk_of_tokens(len(w), x.device)
        for part in (slice(i, i + size) for i in range(0, len(x), size)):
            loss, d_stream[part], d_w = chunk_loss(x[part], w, targets[part], counts[part])
            total = total + loss
            d_weight += d_w
        if eager:
            d_stream = torch.zeros_like(stream, dtype=x.dtype).masked_scatter(learnt[:, None], d_stream)
        ctx.save_for_backward(d_stream, d_weight)
        return total

    @staticmethod
    def backward(ctx, d_total):
        d_stream, d_weight = ctx.saved_tensors
        return d_stream * d_total, d_weight * d_total, None


def token_logprobs(logits, ids, temperature=1.0):
    """Log p(ids[:, 1:]) of softmax(logits / temperature) in fp32 nats, (B, T-1).

    logits (B, T, V) of ids (B, T).
    """
    logits = logits[:, :-1].float()
    logprobs = (logits / temperature if temperature != 1 else logits).log_softmax(-1)   # / 1 would copy them
    return logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1)


def logprobs_after(model, ids, row, place, temperature=1.0):
    """(logits / temperature (N, V), log-probs (N,)), fp32, of the tokens after ids[row, place], (N,) each.

    The head, the dearest part of a small model, reads only these N positions of ids (B, T).
    """
    logits = model.head(model.model(ids)[row, place]).float()
    if temperature != 1:
        logits = logits / temperature
    return logits, -F.cross_entropy(logits, ids[row, place + 1], reduction="none")


def count_params(config):
    """Count a LanguageModel's parameters: {"all", "embedding", "matrices"}; the head counts as a matrix."""
    D, F_, H, G, K, V, L = (config.d_model, config.d_ff, config.n_heads, config.n_kv_heads, config.head_dim,
                            config.vocab_size, config.n_layers)
    block = 2 * D * H * K + 2 * D * G * K + 3 * D * F_
    norms = L * (2 * D + (2 * K if config.qk_norm else 0)) + D
    head = V * D
    return {"all": L * block + norms + V * D + (0 if config.tie_embeddings else head),
            "embedding": V * D, "matrices": L * block + head}


def flops_per_token(config, seq_len):
    """FLOPs of forward and backward for one token: 6 a matrix weight, 12 L H K seq_len for attention.

    As Chowdhery et al. 2022 (PaLM, appendix B) count; the whole row counts although attention is causal.
    """
    return (6 * count_params(config)["matrices"]
            + 12 * config.n_layers * config.n_heads * config.head_dim * seq_len)


def training_memory(config, micro_batch_size, seq_len, state_bytes=8, activation_bytes=4):
    """Bytes one rank needs in training, by part.

    state_bytes: of the optimiser a parameter (8 = two fp32 moments); activation_bytes: 2 under autocast.
    Activations are what autograd keeps for backward. In fp32 always: the stream, its norms' insides and
    outputs, 6 D a token and block, and 2 (H + G) K for qk_norm; in the working type 4 F + 3 H K + 2 G K, and
    the cast matrices once; of the logits of one chunk three fp32 copies.
    """
    n, tokens = count_params(config)["all"], micro_batch_size * seq_len
    H, G, K = config.n_heads, config.n_kv_heads, config.head_dim
    block = (24 * config.d_model + (8 * (H + G) * K if config.qk_norm else 0)
             + activation_bytes * (4 * config.d_ff + 3 * H * K + 2 * G * K))
    cast = activation_bytes * count_params(config)["matrices"] if activation_bytes < 4 else 0
    logits = min(tokens * config.vocab_size, MAX_LOGITS)
    return {"weights": 4 * n, "gradients": 4 * n, "optimizer": state_bytes * n,
            "activations": tokens * config.n_layers * block + cast + 12 * logits}
