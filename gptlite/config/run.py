"""Every section of a run: names, units, ranges and defaults. No torch, no files.

Sections are frozen and strict: an unknown key or a wrong type never passes silently. What no
single field can know (two keys that contradict each other, sizes that cannot fit) is in
`contradictions`. `reader.py` makes a RunConfig from YAML and `--set`.
"""

import math
from typing import Annotated, Literal

from pydantic import Field

from gptlite.config.dropout import DropoutConfig
from gptlite.config.section import Auto, Count, Rate, Section

Beta = Annotated[float, Field(ge=0, lt=1, strict=True)]
# The titles of texts that have a form are what an error message calls for.
Device = Annotated[
    str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d{1,3})?)$", title="auto, cpu, cuda, cuda:N or mps")
]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", title="64 hexadecimal digits")]
Delimiter = Annotated[str, Field(pattern=r"^[^\r\n\"]$", title="one character")]
Ending = Annotated[str, Field(pattern=r"^\.[^\sA-Z./]+$", title="an ending, as in .html")]
Texts = Annotated[tuple[Annotated[str, Field(strict=True)], ...], Field(strict=False)]

ASSUMED_VOCABULARY = {"byte": 257, "char": 64, "bpe": 4096, "tiktoken": 50257}


class DataConfig(Section):
    source: str | Texts = ""
    """File, glob or folder of .txt .md .jsonl .csv .parquet, also .gz and .zst; an address
    (https://, s3:// and all that fsspec knows, hf:// for datasets of the Hub); a list of them; or a
    text that comes with gptlite: `python-docs`, the language reference and docstrings of this
    Python, or `verses`, 6 kB of nonsense verse. Required. A folder that holds train.bin and val.bin
    is taken as it is."""
    sha256: Digest | None = None
    """Digest that a single file or download must have; required for a URL."""
    include: Annotated[tuple[Ending, ...], Field(strict=False)] = ()
    """Further endings that a folder is searched for, as in [.html, .tex]: plain text as it stands,
    but for .json, .ndjson and .tsv."""
    val_source: str | Texts | None = None
    """Text to validate on, named as in `source`, where it is not a part of that: all of `source` is
    then trained on, and `val_fraction` and `split_by` do not apply."""
    text_field: str = "text"
    """Field of a .jsonl or .json record, or column of a .csv, .parquet or dataset, that holds the
    text. Where there is none, or null, there is no document."""
    delimiter: Delimiter | None = None
    """What parts the columns of a .csv, as in ";"; null: a comma, or a tab in a .tsv."""
    separator: Annotated[str, Field(min_length=1)] | None = None
    """Text that parts the documents of a plain text and is left out, as in "<|endoftext|>"; null: a
    file is one document, or each line in the documents layout."""
    layout: Literal["stream", "documents"] = "stream"
    """stream: fixed windows over all text; documents: one document per row, padded (each line of
    a .txt or .md, each record of the other kinds)."""
    val_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the text's bytes kept for validation."""
    split_by: Literal["auto", "tail", "document"] = "auto"
    """tail: the last part of the text; document: whole documents chosen by their digest, copies
    together, until they have about val_fraction of the bytes. auto: tail for the stream layout,
    document for the documents layout."""
    train_tokens: Annotated[int, Field(ge=2, lt=2**40)] | None = None
    """Train on the first so many tokens of the training split only; null: all of it. Validation
    text and vocabulary stay the same, so what less data does can be compared."""
    train_from: Literal["first", "seed"] = "first"
    """Where `train_tokens` are taken. first: at the beginning of the training split; seed: at a
    place that the run's seed names, so that runs of several seeds also differ by their text."""
    test_share: float = Field(0.0, ge=0, lt=1)
    """Share of the validation text, its last, that is kept out of every decision of a run (the best
    checkpoint, early stopping) and measured by `gptlite eval --split test`."""
    cache_dir: str = Field("data/cache", min_length=1)
    """Folder for token files and downloads, named by content."""


class TokenizerConfig(Section):
    kind: Literal["byte", "char", "bpe", "tiktoken"] = "bpe"
    """byte: UTF-8 bytes; char: the characters of the text; bpe: trained on the training text;
    tiktoken: an encoding by `name`."""
    name: str = "gpt2"
    """Encoding for `kind: tiktoken`: gpt2, cl100k_base, o200k_base ..."""
    vocab_size: int = Field(2048, ge=257, le=1_000_000)
    """Tokens of a trained bpe, the end-of-text token included."""
    unknown: Literal["error", "skip", "replace"] = "error"
    """What kind char does with a character the training text did not have."""


class ModelConfig(Section):
    n_layer: Count = 4
    """Transformer blocks."""
    n_head: Count = 4
    """Attention heads per block."""
    n_kv_head: Count | None = None
    """Heads of keys and values, shared by groups of query heads; null: `n_head`."""
    n_embd: Count = 128
    """Width of the residual stream, in features."""
    head_dim: Count | None = None
    """Features of a head; null: n_embd / n_head."""
    context_length: Count = 128
    """Tokens the model sees at once."""
    position: Literal["learned", "rope"] = "learned"
    """Learned position embedding, or rotary embedding of queries and keys."""
    rope_theta: float = Field(10_000.0, gt=1)
    """Base of the wavelengths of rotary embeddings."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before attention, before the MLP and before the logits."""
    norm_eps: float = Field(1e-5, gt=0, lt=1)
    """What norms add to the mean square before they divide by its root."""
    mlp: Literal["gelu", "gelu_exact", "swiglu", "relu2"] = "gelu"
    """Activation; gelu is GPT-2's approximation, gelu_exact nanoGPT's."""
    intermediate_size: Count | None = None
    """Features between the two matrices of the MLP; null: 4 n_embd, with swiglu about 8/3 n_embd,
    which pays for its third matrix."""
    bias: bool = True
    """Biases in linear layers and layernorm."""
    tie_embeddings: bool = True
    """Use the token embedding as output matrix."""
    qk_norm: bool = False
    """RMS-normalise queries and keys per head."""
    init: Literal["gpt2", "torch"] = "gpt2"
    """How weights begin. gpt2: normal with deviation 0.02, less before a residual sum; torch: as
    torch makes layers by default (embeddings with deviation 1), as in the book's code."""

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        """Features of a head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def mlp_width(self) -> int:
        """Features between the two matrices of the MLP."""
        usual = -(-8 * self.n_embd // 3 // 32) * 32 if self.mlp == "swiglu" else 4 * self.n_embd
        return self.intermediate_size or usual

    def reached(self, longest_row: int) -> int | None:
        """How many learned positions rows up to this long train; None: all, or none are learned."""
        short = self.position == "learned" and longest_row < self.context_length
        return longest_row if short else None

    def n_parameters(self, vocab_size: int) -> int:
        """Trainable numbers of the whole model, by arithmetic."""
        c, wide, bias = self.n_embd, self.mlp_width, int(self.bias)
        q, kv = self.head_width * self.n_head, self.head_width * self.kv_heads
        norm = c * (1 + (bias if self.norm == "layernorm" else 0))
        block = (c + bias) * (q + 2 * kv) + q * c + bias * c + 2 * norm
        block += (3 if self.mlp == "swiglu" else 2) * c * wide
        block += bias * (c + (2 if self.mlp == "swiglu" else 1) * wide)
        block += 2 * self.head_width * self.qk_norm
        tables = vocab_size * c * (1 if self.tie_embeddings else 2)
        tables += self.context_length * c if self.position == "learned" else 0
        return self.n_layer * block + tables + norm


class OptimConfig(Section):
    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: Muon for the matrices of the blocks and AdamW for the rest."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate at the end of warm-up."""
    min_lr: float = Field(1e-4, ge=0)
    """Learning rate at the last update, except for `schedule: constant`."""
    warmup_steps: int = Field(100, ge=0, lt=2**40)
    """Updates over which the rate climbs to `lr`."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after warm-up; wsd keeps `lr` and falls linearly over the last fifth."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay of matrices and embeddings; biases and norms have none. An update
    takes lr * weight_decay of each weight away, with the learning rate of that update."""
    weight_decay_schedule: Literal["constant", "with_lr", "linear"] = "constant"
    """How weight_decay itself moves. constant: not at all, so that lr * weight_decay falls with the
    learning rate; with_lr: as the learning rate does, in parts of `lr`; linear: down to 0 at the
    last update."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.99)
    """AdamW's averaging factors for gradient and squared gradient."""
    momentum: Rate = 0.95
    """Muon's averaging factor."""
    grad_clip: float = Field(1.0, ge=0)
    """Largest norm of the gradient of an update; 0: no clipping."""


class TrainConfig(Section):
    max_steps: Count | None = None
    """Updates to make. Exactly one of max_steps and epochs."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training text. Exactly one of max_steps and epochs."""
    max_minutes: float | None = Field(None, gt=0)
    """Minutes that the run may take, evaluations and checkpoints included and what a resumed run
    took before: with `schedule: wsd` the learning rate falls in time to end then, as it would at
    max_steps or epochs, whichever comes first. null: no limit."""
    batch_size: int = Field(32, ge=1, le=1 << 20)
    """Sequences per update, over all processes together."""
    micro_batch_size: Count | Auto = "auto"
    """Sequences per forward pass of a process; auto: as many as memory allows."""
    memory_gib: Annotated[float, Field(gt=0)] | Auto = "auto"
    """What training may take of the device's memory, in GiB; auto: half of it."""
    recompute: bool | Auto = "auto"
    """Keep only each block's input and run the block again going back: a fraction of the memory,
    a third more work. auto: where the budget asks for it."""
    log_interval: Count = 10
    """Updates between lines of metrics."""
    eval_interval: Count = 250
    """Updates between evaluations."""
    eval_batches: Count | Literal["all"] = "all"
    """Batches of `batch_size` sequences per evaluation; all: the whole split."""
    save_interval: Count = 1000
    """Updates between checkpoints; the best and the last are always saved."""
    keep_last: Annotated[int, Field(ge=2)] | Literal["all"] = 2
    """Checkpoints to keep beside the best one."""
    early_stop: Count | Literal["auto", "never"] = "auto"
    """Evaluations without a better validation loss before stopping; auto: 10 when the run passes
    over the text more than twice, else never."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What an update does whose loss or gradient is not finite. stop: save and leave (exit code 4);
    skip: leave the weights as they are and go on, at most 10 times in 1000 updates. Gradients
    that overflow because float16's loss is scaled too much do not count: the scale is halved."""
    average: Literal["none", "ema"] = "none"
    """ema: what is evaluated, saved and generated from is an exponential average of the weights of
    all updates; training itself goes on from the weights of the last one, which are saved too."""
    average_half_life: float = Field(0.02, gt=0, lt=2**40)
    """After how many updates a weight counts half in the average; below 1: a share of the run."""
    threads: Annotated[int, Field(ge=1, le=1024)] | Auto = "auto"
    """CPU threads; results are bit-exact only for the same number."""


class DistillConfig(Section):
    teachers: Texts = ()
    """Run directories whose models the new one learns from, all at once; none: from the text alone.
    They read text as this run does: with its tokenizer."""
    weight: float = Field(1.0, gt=0, le=1)
    """Share of the loss that is the distance from what the teachers say (Kullback-Leibler
    divergence); the rest is that of the text."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits of both before they are compared; the distance is multiplied by its square
    (Hinton, Vinyals and Dean, arXiv:1503.02531)."""


class SampleConfig(Section):
    interval: int = Field(0, ge=0)
    """Updates between samples while training; 0: only at the end."""
    prompts: Texts = ("",)
    """Texts to continue; an empty one starts at the beginning of a document."""
    max_new_tokens: int = Field(200, ge=1, le=1_000_000)
    """Longest continuation, in tokens."""
    temperature: float = Field(0.8, ge=0)
    """Divides the logits; 0 is greedy."""
    top_k: Count | None = None
    """Keep the k most likely tokens."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Keep the most likely tokens whose probabilities sum to at least p."""
    min_p: float | None = Field(None, ge=0, le=1)
    """Keep tokens at least this likely relative to the most likely one."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Above 1: tokens already in the text become less likely (CTRL, arXiv:1909.05858)."""


class LogConfig(Section):
    progress: Literal["auto", "bar", "lines"] = "auto"
    """auto: a bar on a terminal, else plain lines."""
    sinks: Annotated[
        tuple[Literal["tensorboard", "wandb", "trackio"], ...], Field(strict=False)
    ] = ()
    """Where the rows of metrics.jsonl also go, as in [tensorboard]; each is an extra to install."""
    project: str = Field("gptlite", min_length=1)
    """The project's name at wandb and trackio."""


class DistributedConfig(Section):
    engine: Literal["auto", "ddp", "fsdp"] = "auto"
    """Of several processes. ddp: each holds the whole model; fsdp: each holds its part of weights,
    gradients and moments (FSDP2); auto: ddp where it fits."""
    timeout_seconds: float = Field(60.0, ge=1)
    """How long a process may stand still before all end, and it is named."""


class RunConfig(Section):
    seed: int = Field(1337, ge=0, lt=2**63)
    """Names every random number of the run."""
    out_dir: str | None = Field(None, min_length=1)
    """Run directory; null: the next free runs/NAME."""
    init_from: str | None = Field(None, min_length=1)
    """Run directory or checkpoint whose weights the model starts from."""
    device: Device = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of matrix products; weights and sums stay float32. auto: one that the device has
    hardware for; float16, with a scaled loss, is for GPUs that have no bfloat16."""
    compile: bool | Auto = "auto"
    """Compile the model with torch.compile."""
    attention: Literal["auto", "math", "fused", "sdpa"] = "auto"
    """math: plain matrix products; fused: the same with softmax and dropout in one compiled loop
    (CPU); sdpa: torch's fused kernels."""
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    dropout: DropoutConfig = DropoutConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    distill: DistillConfig = DistillConfig()
    sample: SampleConfig = SampleConfig()
    log: LogConfig = LogConfig()
    distributed: DistributedConfig = DistributedConfig()

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.data.source,) if isinstance(self.data.source, str) else self.data.source

    @property
    def val_sources(self) -> tuple[str, ...]:
        named = () if self.data.val_source is None else self.data.val_source
        return (named,) if isinstance(named, str) else named

    @property
    def split_by(self) -> str:
        if self.val_sources:
            return "tail"  # where the text to validate on begins
        if self.data.split_by != "auto":
            return self.data.split_by
        return "tail" if self.data.layout == "stream" else "document"

    def planned_steps(self, n_rows: int) -> int:
        """Updates of the run with so many rows of training text, at least one."""
        if self.train.max_steps is not None:
            return self.train.max_steps
        assert self.train.epochs is not None
        return max(1, math.ceil(self.train.epochs * n_rows / self.train.batch_size))

    def half_life(self, max_steps: int) -> float:
        """Of the average of weights, in updates."""
        given = self.train.average_half_life
        return max(1.0, given * max_steps) if given < 1 else given
