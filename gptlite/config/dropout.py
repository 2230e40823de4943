"""Where a network can drop, and the words a config has for it. No torch.

Shapes: B samples, T positions, S positions of keys, H heads, C features, D per head, F in the MLP.
"""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Discriminator, Field, Tag

from gptlite.config.section import Auto, Rate, Section

RATES = 1 << 16
"""Rates are multiples of 1 / RATES: a mask compares draws of 16 bits with a whole number."""


class Kind(NamedTuple):
    """Shapes of a site, a letter per dimension."""

    tensor: str
    """What passes through."""
    mask: str
    """A draw per entry; 1 where all share one."""
    per_layer: bool = True

    @property
    def by_feature(self) -> bool:
        """Whether values drop one by one, so that positions may share a mask."""
        return self.mask == self.tensor

    @property
    def locked(self) -> str:
        return self.mask.replace("T", "1")


SITES = {
    "token": Kind("BTC", "BT1", per_layer=False),
    "embedding": Kind("BTC", "BTC", per_layer=False),
    "key": Kind("BHTS", "BHTS"),
    "attention_weights": Kind("BHTS", "BHTS"),
    "head": Kind("BHTD", "BH11"),
    "attention_context": Kind("BTZ", "BTZ"),
    "attention_output": Kind("BTC", "BTC"),
    "mlp_activation": Kind("BTF", "BTF"),
    "mlp_output": Kind("BTC", "BTC"),
    "layer": Kind("BTC", "B11"),
    "final": Kind("BTC", "BTC", per_layer=False),
}
"""Every site in the order of the forward pass."""


class SiteConfig(Section):
    rate: Rate | None = None
    """Share dropped; null: what preset and rate give this site."""
    granularity: Literal["element", "locked"] | None = None
    """element: every value by itself; locked: one mask for all positions of a sample (Gal and
    Ghahramani, arXiv:1512.05287). Not for token, head and layer, which drop whole units."""
    scale: Literal["inverted", "none"] | None = None
    """Only for layer. inverted (the default): what stays is divided by the share that stays, as in
    stochastic depth; none: it is not, as in LayerDrop (arXiv:1909.11556)."""
    profile: (
        Literal["constant", "increasing", "decreasing"]
        | Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(strict=False)]
        | None
    ) = None
    """Over depth, for sites that every layer has. increasing: (l + 1) / n_layer of the rate in
    layer l; decreasing: (n_layer - l) / n_layer; or a list with the share of the rate per layer."""


def number_or_mapping(value: Any) -> str:
    return "mapping" if isinstance(value, dict | SiteConfig) else "number"


Site = Annotated[
    Annotated[Rate | None, Tag("number")] | Annotated[SiteConfig, Tag("mapping")],
    Discriminator(number_or_mapping),
]


class SiteRates(Section):
    token: Site = None
    """Whole token embeddings, before the position is added, (B, T, 1)."""
    embedding: Site = None
    """Sum of token and position embedding, (B, T, C)."""
    key: Site = None
    """Keys hidden before the softmax, so that rows still sum to one; a query always sees itself
    (DropKey, arXiv:2208.02646). (B, H, T, S); locked (B, H, 1, S)."""
    attention_weights: Site = None
    """Softmax weights, (B, H, T, S); the rows then no longer sum to one. locked (B, H, 1, S)."""
    head: Site = None
    """Whole heads of a sample, before they are joined (DropHead, arXiv:2004.13342)."""
    attention_context: Site = None
    """Weighted sum of values, heads joined, before the output projection, (B, T, C)."""
    attention_output: Site = None
    """Output projection of attention, before the residual sum, (B, T, C)."""
    mlp_activation: Site = None
    """After the activation of the MLP, (B, T, F)."""
    mlp_output: Site = None
    """Output of the MLP, before the residual sum, (B, T, C)."""
    layer: Site = None
    """Whole layers of a sample: what attention and MLP add to the residual stream, (B, 1, 1)."""
    final: Site = None
    """After the last norm, before the logits, (B, T, C)."""


PresetName = Literal[
    "none", "gpt2", "nanogpt", "raschka", "megatron", "t5", "article-weights", "article-context"
]


class Preset(NamedTuple):
    rate: float
    sites: tuple[str, ...]
    granularity: Literal["element", "locked"] = "element"


_GPT2_SITES = ("embedding", "attention_weights", "attention_output", "mlp_output")
PRESETS: dict[PresetName, Preset] = {
    "none": Preset(0.0, ()),
    "gpt2": Preset(0.1, _GPT2_SITES),
    "nanogpt": Preset(0.0, _GPT2_SITES),
    "raschka": Preset(0.1, _GPT2_SITES),
    "megatron": Preset(0.1, _GPT2_SITES),
    "t5": Preset(0.1, (*_GPT2_SITES, "mlp_activation", "final"), "locked"),
    "article-weights": Preset(0.1, ("attention_weights",)),
    "article-context": Preset(0.1, ("attention_context",)),
}


class SitePlan(NamedTuple):
    """All that is decided about a site."""

    rate: float
    locked: bool = False
    inverted: bool = True
    profile: str | tuple[float, ...] = "constant"

    def rate_in(self, layer: int, n_layer: int) -> float:
        """The rate of one layer, counted from 0."""
        if isinstance(self.profile, tuple):
            return self.rate * self.profile[layer]
        shares = {"increasing": (layer + 1) / n_layer, "decreasing": (n_layer - layer) / n_layer}
        return self.rate * shares.get(self.profile, 1.0)


class DropoutSchedule(Section):
    mode: Literal["standard", "early", "late"] = "standard"
    """standard: the whole run; early: only before `until`; late: only from `until` on (Liu et al.,
    arXiv:2303.01500)."""
    shape: Literal["constant", "linear", "cosine"] = "constant"
    """How the rates move. standard: from 0 up to full at `until`; early: from full down to 0 at
    `until`; late: from 0 at `until` up to full at the end. constant: they jump."""
    until: float = Field(1.0, gt=0, le=1)
    """Fraction of the run."""


class DropoutConfig(Section):
    preset: PresetName = "gpt2"
    """Which sites drop, and at which rate when `rate` is not given."""
    rate: Rate | Auto | None = None
    """Share dropped at the sites of the preset; null: the preset's own; auto: from the epochs that
    are planned."""
    sites: SiteRates = SiteRates()
    """Per site a rate, or a mapping of rate, granularity, scale and profile; overrides preset and
    rate."""
    schedule: DropoutSchedule = DropoutSchedule()
    """How all rates move over the run."""
    masks: Literal["auto", "keyed", "native"] = "auto"
    """keyed: a mask is a function of seed, step, site, layer, sample, position and feature; native:
    torch's generator and kernels, without those guarantees. auto: keyed, except attention weights
    inside a fused CUDA kernel."""

    def site(self, name: str) -> SiteConfig:
        value = getattr(self.sites, name)
        return value if isinstance(value, SiteConfig) else SiteConfig(rate=value)

    def plan(self) -> dict[str, SitePlan]:
        """Every site, in the order of the forward pass; `rate: auto` must be resolved before."""
        assert self.rate != "auto", "rate: auto is not resolved"
        preset = PRESETS[self.preset]
        rate = preset.rate if self.rate is None else self.rate
        plan = {}
        for name in SITES:
            own, placed = self.site(name), rate if name in preset.sites else 0.0
            granularity = preset.granularity if name in preset.sites else "element"
            plan[name] = SitePlan(
                placed if own.rate is None else own.rate,
                (own.granularity or granularity) == "locked",
                own.scale != "none",
                own.profile or "constant",
            )
        return plan

    def rates(self) -> dict[str, float]:
        """The full rate of every site."""
        return {name: plan.rate for name, plan in self.plan().items()}

    def fused_sites(self, kernel: str) -> tuple[str, ...]:
        """Sites that drop inside a fused kernel, by its own masks."""
        fused = kernel == "sdpa" and self.rates()["attention_weights"] > 0
        return ("attention_weights",) if fused else ()

    def native_sites(self, kernel: str) -> tuple[str, ...]:
        """Sites whose masks torch draws."""
        if self.masks == "native":
            return tuple(site for site, rate in self.rates().items() if rate > 0)
        return self.fused_sites(kernel)
