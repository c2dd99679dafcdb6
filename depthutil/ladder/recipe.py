"""The settings of a ladder: which models, how large, and how they are trained."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from depthutil import _checks
from depthutil.corpus import VOCABULARY
from depthutil.ladder.designs import Design

HEAD = 16  # channels of an attention head

SCALES: dict[str, dict[str, Any]] = {
    "demo": {
        "width": 32,
        "depths": (1, 2, 4),
        "seeds": (0,),
        "sequence": 64,
        "batch": 8,
        "steps": 150,
        "warmup": 20,
        "test_every": 50,
        "test_sequences": 64,
        "final_sequences": 512,
    },
    "cpu": {},
    "gpu": {
        "width": 128,
        "depths": (1, 2, 4, 8, 16, 32),
        "seeds": (0, 1, 2),
        "sequence": 256,
        "batch": 64,
        "steps": 8_000,
        "learning_rates": (5e-4, 1e-3, 2e-3, 4e-3),
        "search_steps": 1_000,
    },
    "gpu-wide": {
        "width": 256,
        "depths": (1, 2, 4, 8, 16, 32),
        "seeds": (0, 1, 2),
        "sequence": 256,
        "batch": 128,
        "steps": 16_000,
        "learning_rates": (5e-4, 1e-3, 2e-3),
        "search_steps": 1_000,
    },
}


@dataclass(frozen=True)
class LadderConfig:
    """Every setting of a ladder. :meth:`at` has those of the book.

    Parameters
    ----------
    width : int
        Size ``m`` of the residual stream, a multiple of 16: heads have 16 channels each.
    depths : sequence of int
        Numbers of layers.
    seeds : sequence of int
        Each seeds initial weights and the order of the text, the same for every depth.
    sequence : int
        Bytes predicted in a sequence. Each begins with the token that the tokenizer sets before
        every text, so that a piece from anywhere in a document reads like those in training.
    batch, steps : int
        Sequences a step; steps of AdamW.
    learning_rates : sequence of float
        The peak of the learning rate. Of several, :func:`best_rate` chooses one for each depth.
    search_steps : int
        Steps with each rate that is tried; not used for a single one.
    warmup : int
        Steps over which the rate rises; it then falls to zero along a cosine.
    weight_decay : float
        AdamW's, on matrices; the gains of the norms have none.
    init_gain : float
        All initial matrices have the standard deviation ``init_gain / √width``, at every
        depth: a model starts from the same layers as a deeper one, and only training makes the
        updates of deeper models smaller. (GPT-2's 0.02 is 0.55/√768; of 0.16, 0.4 and 0.8,
        0.4 had the lowest loss after 600 steps at width 64, depth 4.)
    test_every, test_sequences : int
        Steps between tests, and held-out sequences in each, the same ones every time.
    final_sequences : int, optional
        Held-out sequences in the last test; all by default.
    scale : str
        What to call the size of this run in captions.
    cooldown : float, optional
        Instead of a cosine, a constant rate that falls to zero over this last share of the steps,
        by one less the square root of what has passed of it. Runs of several lengths then share
        all but their ends, and a model that grows can do so before the rate falls (Kapl et al.,
        arXiv 2512.08819). With 0 it stays constant.
    design : Design
        How the models use their depth.

    Raises
    ------
    ValueError
        If a setting makes no sense, in one sentence.

    Examples
    --------
    >>> config = LadderConfig()
    >>> config.tokens, config.parameters(1), config.parameters(16) - config.parameters(15)
    (12288000, 83264, 50304)
    """

    width: int = 64
    depths: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16)
    seeds: tuple[int, ...] = (0, 1)
    sequence: int = 128
    batch: int = 16
    steps: int = 6_000
    learning_rates: tuple[float, ...] = (3e-3,)
    search_steps: int = 600
    warmup: int = 100
    weight_decay: float = 0.1
    init_gain: float = 0.4
    test_every: int = 500
    test_sequences: int = 256
    final_sequences: int | None = None
    scale: str = "custom"
    cooldown: float | None = None
    design: Design = field(default_factory=Design)

    def __post_init__(self) -> None:
        if isinstance(self.design, dict):  # as JSON holds it
            object.__setattr__(self, "design", Design(**self.design))
        _checks.sequences(self, ("depths", "seeds"), int)
        _checks.sequences(self, ("learning_rates",), float)
        sizes = ("width", "sequence", "batch", "steps", "search_steps", "test_every")
        _checks.counts(self, (*sizes, "test_sequences"))
        if self.final_sequences is not None:
            _checks.counts(self, ("final_sequences",))
        for name in ("warmup", "weight_decay", "init_gain"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{name} is a number of at least 0, not {value!r}")
        if self.width % HEAD:
            raise ValueError(f"width is a multiple of {HEAD}, not {self.width}")
        if min(self.depths) < 1 or min(self.seeds) < 0:
            raise ValueError("depths are at least 1, and seeds are not negative")
        if not all(0 < rate < math.inf for rate in self.learning_rates):
            raise ValueError(f"learning_rates are positive, not {self.learning_rates}")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup is less than the {self.steps:,} steps, not {self.warmup}")
        if len(self.learning_rates) > 1 and self.warmup >= self.search_steps:
            raise ValueError(f"search_steps are more than the warmup of {self.warmup}")
        if self.cooldown is not None and not 0 <= self.cooldown < 1:
            raise ValueError(f"cooldown is a share of the steps below 1, not {self.cooldown}")

    @classmethod
    def at(cls, scale: str = "cpu", **changes: Any) -> LadderConfig:
        """The settings of a scale.

        Parameters
        ----------
        scale : str
            ``"demo"``, seconds, too little for depth to matter. ``"cpu"``: width 64,
            depths 1 to 16, 12.3 million tokens, hours of a core. ``"gpu"``: width 128, depths
            to 32, 20 tokens for each parameter of the deepest, three seeds, learning rate
            chosen for each depth. ``"gpu-wide"``: width 256. The library is 9.7 million
            bytes, so that these two read it 13 and 54 times: compare training and held-out
            loss, or give :func:`depthutil.corpus.corpus` a larger folder.
        **changes
            Settings to change; ``config.scale`` then names them.

        Examples
        --------
        >>> LadderConfig.at("cpu", seeds=(0,)).scale
        'cpu, with other seeds'
        >>> gpu = LadderConfig.at("gpu")
        >>> gpu.tokens / gpu.parameters(32) > 20
        True
        """
        if scale not in SCALES:
            raise ValueError(f"there is no scale {scale!r}: choose from {', '.join(SCALES)}")
        label = scale + (f", with other {', '.join(changes)}" if changes else "")
        return cls(**{**SCALES[scale], "scale": label, **changes})

    @property
    def hidden(self) -> int:
        """Hidden size of an MLP, which is 8/3 of the width as in Llama, rounded up to 16ths.

        A layer then has about the ``12 m²`` parameters that laws of scaling count.
        """
        return 16 * math.ceil(self.width / 6)

    @property
    def init_std(self) -> float:
        """Standard deviation of the initial matrices."""
        return self.init_gain / math.sqrt(self.width)

    @property
    def tokens(self) -> int:
        """Tokens that each model is trained to predict."""
        return self.steps * self.batch * self.sequence

    def parameters(self, depth: int) -> int:
        """Number of parameters of a model; embedding and head are separate matrices."""
        m = self.width
        layer = 4 * m * m + 3 * m * self.hidden + 2 * m
        return len(set(self.design.layers(depth))) * layer + 2 * VOCABULARY * m + m

    def flops(self, depth: int, step: int | None = None) -> float:
        """Operations of the products in training up to a step, by default to the end.

        Six for each weight and token, two forward and four backward, a weight that is used twice
        counting twice; and those of attention, which weighs ``sequence / 2`` states in the mean.
        The embedding is looked up and costs none.

        Examples
        --------
        >>> grown = LadderConfig(depths=(12,), design=Design(grow="midas"))
        >>> round(grown.flops(12) / LadderConfig().flops(12), 2)
        0.77
        """
        m, steps = self.width, self.steps if step is None else step
        layer = 6 * (4 * m * m + 3 * m * self.hidden) + 6 * m * self.sequence
        head = 6 * VOCABULARY * m
        each = self.batch * self.sequence
        layers, before = 0, 0
        for deep, end in zip(self.design.depths(depth), self.growth(depth), strict=True):
            layers += deep * (min(end, steps) - before)
            before = min(end, steps)
        return float(each) * (layers * layer + steps * head)

    def growth(self, depth: int) -> list[int]:
        """After which step each stage of a growing model ends."""
        return self.design.ends(depth, self.steps)

    def rate(self, peak: float, step: int) -> float:
        """Learning rate of the update that follows ``step`` updates."""
        if step < self.warmup:
            return peak * (step + 1) / self.warmup
        if self.cooldown is not None:
            falling = self.cooldown * self.steps
            past = (step - (self.steps - falling)) / falling if falling else 0.0
            return peak * (1 - math.sqrt(max(past, 0.0)))
        part = (step - self.warmup) / (self.steps - self.warmup)
        return peak * 0.5 * (1 + math.cos(math.pi * part))

    def name(self, depth: int, seed: int) -> str:
        """What a model is called, in ``models/`` and by ``depthutil.models.load``.

        Examples
        --------
        >>> LadderConfig().name(depth=8, seed=0)
        'ladder-w64-d08-s0'
        """
        label = f"-{self.design.label}" if self.design.label else ""
        return f"ladder-w{self.width}-d{depth:02d}{label}-s{seed}"


class Shard(NamedTuple):
    """One model of a ladder."""

    depth: int
    seed: int


def shards(config: LadderConfig) -> list[Shard]:
    """The models in the order in which to train them, so that to stop early still pays.

    Seed by seed, since one seed is a ladder; the cheapest and the dearest depths take turns.

    Examples
    --------
    >>> [shard.depth for shard in shards(LadderConfig(seeds=(0,)))]
    [1, 16, 2, 12, 3, 8, 4, 6]
    """
    depths = sorted(config.depths)
    turns = [depths[-1 - i // 2] if i % 2 else depths[i // 2] for i in range(len(depths))]
    return [Shard(depth, seed) for seed in config.seeds for depth in turns]


def slug(config: LadderConfig, depth: int, seed: int) -> str:
    """A file name for a model's checkpoint: the same settings, the same name.

    Examples
    --------
    >>> slug(LadderConfig(), 8, 0)
    'ladder-w64-d08-s0_...'
    """
    digest = hashlib.sha256(json.dumps(recipe(config), sort_keys=True).encode()).hexdigest()
    return f"{config.name(depth, seed)}_{digest[:12]}"


def recipe(config: LadderConfig) -> dict[str, Any]:
    """What one model's training depends on, as JSON holds it."""
    other = {"depths", "seeds", "scale", "learning_rates", "search_steps"}
    # What came later is left out where it changes nothing, so that names stay what they were.
    other |= {name for name, usual in _USUAL.items() if getattr(config, name) == usual}
    return json.loads(json.dumps({k: v for k, v in asdict(config).items() if k not in other}))


_USUAL = {"cooldown": None, "design": Design()}
