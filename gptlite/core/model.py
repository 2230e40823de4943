"""The GPT: token ids in, logits out, readable from top to bottom.

Shapes: B sequences, T new tokens, S tokens seen (T plus those in the cache), C features, H query
heads, G heads of keys and values, D features per head (usually C / H), V tokens in the vocabulary.

GPT-2 by default (pre-norm, learned positions, GELU, biases, tied embedding), so that its weights
load here and give its logits. Every other choice is one field of ModelConfig.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptlite.config.dropout import DropoutConfig
from gptlite.config.run import ModelConfig, RunConfig
from gptlite.core.dropout import Dropout, SiteMaker, site_maker
from gptlite.core.kernels import Linear, can_read_cache, causal_attention, fits, gelu, read_cache
from gptlite.core.loss import Lesson, total_lesson, total_nats
from gptlite.core.masks import MaskKeys, mask_keys
from gptlite.data.batches import Batch
from gptlite.keys import key

NO_DROPOUT = DropoutConfig(preset="none")


class KVCache:
    """Keys and values of the tokens seen so far, as many in each row as `lengths` says.

    Each call of the model adds one token to every row, or several where all rows are as long. Only
    the first `len(lengths)` of the rows that there is room for are in use.
    """

    def __init__(self, model: "GPT", batch_size: int) -> None:
        config = model.config
        shape = (batch_size, config.kv_heads, config.context_length, config.head_width)
        device = model.token_embedding.weight.device
        # Zeros: what a shorter row has not written meets a weight of 0, and 0 x NaN is NaN.
        self.keys = [torch.zeros(shape, device=device) for _ in range(config.n_layer)]
        self.values = [torch.zeros(shape, device=device) for _ in range(config.n_layer)]
        self.lengths = [0] * batch_size
        self.at = torch.empty(0)

    def place(self, T: int) -> tuple[Tensor, Tensor | None]:
        """Where T new tokens of each row stand, (B or 1, T), and what they may see, as `place`."""
        alike, end = len(set(self.lengths)) == 1, max(self.lengths) + T
        assert T == 1 or alike, "rows that are not as long take one token at a time"
        device = self.keys[0].device
        self.at = torch.tensor(self.lengths, device=device)[:, None] + torch.arange(
            T, device=device
        )
        if alike and (T == 1 or end == T):
            return self.at[:1], None
        visible = torch.arange(end, device=device) <= self.at[..., None]  # (B, T, S)
        return self.at, visible[:, None]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, G, T, D) behind what is there and return all of it, (B, G, S, D)."""
        keys, values, B = self.keys[layer], self.values[layer], len(self.lengths)
        rows, end = torch.arange(B, device=k.device)[:, None], max(self.lengths) + k.shape[2]
        keys[rows, :, self.at] = k.transpose(1, 2).to(keys.dtype)
        values[rows, :, self.at] = v.transpose(1, 2).to(values.dtype)
        return keys[:B, :, :end], values[:B, :, :end]

    def lengthen(self, T: int) -> None:
        """T tokens have gone through all layers."""
        self.lengths = [length + T for length in self.lengths]

    def decode(self, block: "Block", x: Tensor, scene: "Scene") -> Tensor | None:
        """x (B, 1, C) through a whole block at once, where `decode.DecodingCache` can."""
        return None


class Scene(NamedTuple):
    """What every layer needs to know of the batch."""

    visible: Tensor | None
    """(B or 1, 1, T, S) True where a query may look; None: every token before it."""
    rotation: tuple[Tensor, Tensor] | None
    """cos and sin of the rotary angles, (B or 1, 1, T, D/2)."""
    keys: MaskKeys | None
    """Names the masks of dropout; None where nothing drops."""
    at: Tensor | None = None
    """(B, T) where new tokens stand in the rows of a cache."""


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: ModelConfig, site: SiteMaker, layer: int, kernel: str):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.kv_heads
        self.layer, self.kernel = layer, kernel
        self.head_width = config.head_width
        width = (config.n_head + 2 * config.kv_heads) * self.head_width
        self.qkv = Linear(config.n_embd, width, bias=config.bias)
        self.output = Linear(config.n_head * self.head_width, config.n_embd, bias=config.bias)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_width, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(self.head_width, eps=config.norm_eps)
        self.drop_key = site("key", layer)
        self.drop_weights = site("attention_weights", layer)
        self.drop_head = site("head", layer)
        self.drop_context = site("attention_context", layer)
        self.drop_output = site("attention_output", layer)

    def forward(self, x: Tensor, scene: Scene, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        H, G, D = self.n_head, self.n_kv_head, self.head_width
        qkv = self.qkv(x).view(B, T, H + 2 * G, D).transpose(1, 2)  # (B, H + 2G, T, D)
        q, k, v = qkv.split((H, G, G), dim=1)
        if self.qk_norm:
            q, k = self.q_norm(q.float()), self.k_norm(k.float())
        if scene.rotation is not None:
            q, k = rotate(q, *scene.rotation), rotate(k, *scene.rotation)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, G, S, D)
        z = self.drop_head(self.attend(q, k, v, scene), scene.keys)  # (B, H, T, D)
        z = self.drop_context(z.transpose(1, 2).reshape(B, T, H * D), scene.keys)
        return self.drop_output(self.output(z), scene.keys, x.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scene: Scene) -> Tensor:
        """Weighted sums of values, (B, H, T, D), by the kernel that the rates allow."""
        if scene.at is not None and self.kernel != "math" and can_read_cache(q, v):
            return read_cache(q, k, v, scene.at)
        if k.shape[1] < self.n_head:
            k, v = (x.repeat_interleave(self.n_head // x.shape[1], dim=1) for x in (k, v))
        visible = self.hide_keys(q, k, scene) if self.drop_key.acts else scene.visible
        if self.kernel == "sdpa":
            rate, plain = self.drop_weights.rate_now, visible is None and q.shape[2] > 1
            return F.scaled_dot_product_attention(q, k, v, visible, rate, is_causal=plain)
        if self.kernel == "fused" and visible is None and not self.drop_weights.native and fits(v):
            mask = self.drop_weights.mask(scene.keys) if self.drop_weights.live else None
            return causal_attention(q, k, v, mask)
        return self.drop_weights(attention_weights(q, k, visible), scene.keys, v.dtype) @ v

    def hide_keys(self, q: Tensor, k: Tensor, scene: Scene) -> Tensor:
        """Who still sees whom, (B, H, T, S), when some keys are hidden; all see themselves."""
        T, S = q.shape[2], k.shape[2]
        visible = causal(T, S, q.device) if scene.visible is None else scene.visible
        itself = torch.eye(S, dtype=torch.bool, device=q.device)[S - T :]
        others = (visible & ~itself).expand(*q.shape[:3], S)
        return (self.drop_key(others.to(q.dtype), scene.keys) > 0) | (visible & itself)


def causal(T: int, S: int, device: torch.device) -> Tensor:
    """(T, S) True where the last T of S positions may look."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def attention_weights(q: Tensor, k: Tensor, visible: Tensor | None) -> Tensor:
    """softmax(q k / sqrt(D)), (B, H, T, S); a row that may see nothing is all zeros."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if visible is None:
        past = causal(q.shape[2], k.shape[2], q.device)
        return scores.masked_fill(~past, -math.inf).softmax(-1)
    # The lowest finite number instead of -inf: a row without any key must not become NaN.
    weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)
    return weights * visible


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of each head by an angle per position (RoFormer, 2104.09864)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class MLP(nn.Module):
    """Two matrices with an activation between; swiglu has a third for the gate."""

    def __init__(self, config: ModelConfig, site: SiteMaker, layer: int) -> None:
        super().__init__()
        self.activation = config.mlp
        gates = 2 if config.mlp == "swiglu" else 1
        self.up = Linear(config.n_embd, gates * config.mlp_width, bias=config.bias)
        self.down = Linear(config.mlp_width, config.n_embd, bias=config.bias)
        self.drop_activation = site("mlp_activation", layer)
        self.drop_output = site("mlp_output", layer)

    def forward(self, x: Tensor, scene: Scene) -> Tensor:
        h = self.drop_activation(self.activate(self.up(x)), scene.keys)  # (B, T, 4C)
        return self.drop_output(self.down(h), scene.keys, x.dtype)

    def activate(self, h: Tensor) -> Tensor:
        if self.activation == "gelu":
            return gelu(h)
        if self.activation == "gelu_exact":
            return F.gelu(h)
        if self.activation == "relu2":
            return F.relu(h).square()
        gate, value = h.chunk(2, dim=-1)
        return F.silu(gate) * value


class Block(nn.Module):
    def __init__(self, config: ModelConfig, site: SiteMaker, layer: int, kernel: str):
        super().__init__()
        self.norm_1 = make_norm(config)
        self.attention = Attention(config, site, layer, kernel)
        self.norm_2 = make_norm(config)
        self.mlp = MLP(config, site, layer)
        self.drop_layer = site("layer", layer)

    def forward(self, x: Tensor, scene: Scene, cache: KVCache | None) -> Tensor:
        if cache is not None and (decoded := cache.decode(self, x, scene)) is not None:
            return decoded
        # The same mask twice: a layer drops whole.
        x = x + self.drop_layer(self.attention(self.norm_1(x), scene, cache), scene.keys)
        return x + self.drop_layer(self.mlp(self.norm_2(x), scene), scene.keys)


def make_norm(config: ModelConfig) -> nn.RMSNorm | nn.LayerNorm:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


class GPT(nn.Module):
    """A decoder-only transformer.

    `dropout` plans every site; `kernel` is `math`, `fused` or `sdpa`; `seed` names the weights;
    `recompute` makes what the backward pass needs again instead of keeping it.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        dropout: DropoutConfig = NO_DROPOUT,
        *,
        kernel: str = "math",
        seed: int = 0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.vocab_size, self.recompute = config, vocab_size, recompute
        self.token_embedding = nn.Embedding(vocab_size, config.n_embd)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.context_length, config.n_embd)
        site = site_maker(dropout, config.n_layer, config.n_head, kernel)
        self.drop_token, self.drop_embedding = site("token"), site("embedding")
        layers = range(config.n_layer)
        self.blocks = nn.ModuleList([Block(config, site, layer, kernel) for layer in layers])
        self.norm, self.drop_final = make_norm(config), site("final")
        self.head = Linear(config.n_embd, vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.token_embedding.weight
        init_weights(self, seed)

    @classmethod
    def of_run(cls, run: RunConfig, vocab_size: int) -> "GPT":
        """The untrained model of a resolved run."""
        recompute = run.train.recompute is True
        return cls(
            run.model,
            vocab_size,
            run.dropout,
            kernel=run.attention,
            seed=run.seed,
            recompute=recompute,
        )

    def forward(
        self,
        ids: Tensor,
        real: Tensor | None = None,
        cache: KVCache | None = None,
        samples: Tensor | None = None,
        targets: Tensor | None = None,
        lesson: Lesson | None = None,
    ) -> Tensor:
        """(B, T) ids → (B, T, V) logits, or with targets (B, T) the sum of their nats, which a
        `lesson` of teachers weighs against the divergence from them.

        `real` is False at padding, which changes nothing else. `samples` (B,) of
        `masks.sample_keys` names the masks when training with dropout.
        """
        x = self.features(ids, real, cache, samples)
        if targets is None:
            return self.head(x)
        if lesson is not None:
            return total_lesson(self.head(x), targets, lesson)
        return total_nats(x, self.head.weight, targets)

    def features(
        self,
        ids: Tensor,
        real: Tensor | None = None,
        cache: KVCache | None = None,
        samples: Tensor | None = None,
    ) -> Tensor:
        """What the output matrix reads, (B, T, C)."""
        x, scene = self.embed(ids, real, cache, samples)
        x = self.run_blocks(x, scene, cache=cache)
        if cache is not None:
            cache.lengthen(ids.shape[1])
        return x

    def embed(
        self,
        ids: Tensor,
        real: Tensor | None = None,
        cache: KVCache | None = None,
        samples: Tensor | None = None,
    ) -> tuple[Tensor, Scene]:
        """What the first block reads, (B, T, C), and what every block needs to know."""
        if cache is None:
            position, visible = place(ids, real)
        else:
            position, visible = cache.place(ids.shape[1])
        keys = None if samples is None else mask_keys(samples, position, real)
        x = self.drop_token(self.token_embedding(ids).float(), keys)  # weights may be bfloat16
        rotation = None
        if self.config.position == "learned":
            x = x + self.position_embedding(position)
        else:
            rotation = angles(position, self.config)
        at = None if cache is None else cache.at
        return self.drop_embedding(x, keys), Scene(visible, rotation, keys, at)

    def run_blocks(
        self, x: Tensor, scene: Scene, first: int = 0, cache: KVCache | None = None
    ) -> Tensor:
        """From what block `first` reads to what the output matrix reads, (B, T, C)."""
        for block in self.blocks[first:]:
            again = self.recompute and self.training
            x = self.run_again(block, x, scene) if again else block(x, scene, cache)
        return self.drop_final(self.norm(x), scene.keys)

    def run_again(self, block: nn.Module, x: Tensor, scene: Scene) -> Tensor:
        """Keeps nothing of a block but its input; going back runs it again, with equal masks."""
        generator = any(module.native for module in self.modules() if isinstance(module, Dropout))
        out: Tensor = checkpoint(
            block, x, scene, None, use_reentrant=False, preserve_rng_state=generator
        )
        return out


def place(ids: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Positions (B or 1, T), counted from the first real token, and who sees whom, (B, 1, T, T).

    None instead of a mask where all is real and plainly causal, which fused kernels do best.
    """
    T = ids.shape[1]
    if real is None:
        return torch.arange(T, device=ids.device)[None], None
    position = (real.cumsum(1) - 1).clamp(min=0)
    return position, (causal(T, T, ids.device) & real[:, None, :])[:, None]


def angles(position: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, (B or 1, 1, T, D/2)."""
    share = torch.arange(0, config.head_width, 2, device=position.device) / config.head_width
    frequency = config.rope_theta**-share
    turn = position[:, None, :, None].float() * frequency
    return turn.cos(), turn.sin()


@torch.no_grad()
def init_weights(model: GPT, seed: int) -> None:
    """GPT-2's: normal with deviation 0.02, less before a residual sum by the number of sums.

    torch's instead, if asked: embeddings normal with deviation 1, linear layers uniform up to one
    over the root of their inputs. Each tensor is drawn from a key of its own name: adding a layer
    or an option moves no other.
    """
    inputs = {name: m.in_features for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, parameter in model.named_parameters():
        module, generator = name.rpartition(".")[0], torch.Generator()
        generator.manual_seed(key(seed, "weights", name) >> 1)
        if model.config.init == "torch" and module in inputs:
            most = 1 / math.sqrt(inputs[module])
            nn.init.uniform_(parameter, -most, most, generator=generator)
        elif parameter.ndim < 2:
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.ones_(parameter)
        else:
            residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
            std = 0.02 / math.sqrt(2 * model.config.n_layer) if residual else 0.02
            std = 1.0 if model.config.init == "torch" else std
            nn.init.normal_(parameter, std=std, generator=generator)


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inputs, targets, and which of them are real (None: all), each (B, T)."""
    real = None if batch.real is None or batch.real.all() else torch.from_numpy(batch.real)
    inputs, targets = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)
    return inputs.to(device), targets.to(device), None if real is None else real.to(device)
