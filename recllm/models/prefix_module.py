"""Which items of a history stand before the answer: RCLRec's prefix module.   RCLRec, section 2

    q = MLP([W_u f_u ; e_pay])      f_u = [the user's embedding ; the prompt's last state ; the mean of item states]
    s_j = ⟨q, h_j⟩ / sqrt(D)        h_j the state at item j's last token

The K most relevant items are chosen, least relevant first. `selection` recent or random chooses without a query, and
`none` chooses nothing: the ablations. On disk it is two files beside the model's.

P prompts, J items in the longest history, D width, K items chosen, U width of a user's embedding.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recllm.errors import UserError
from recllm.files import digest, read_object, require, write_json, write_whole
from recllm.objectives.rclrec import ABSENT, ascending_top_k

Selection = Literal["learned", "recent", "random", "none"]
QueryStart = Literal["context", "random"]
WEIGHTS, SETTINGS = "prefix_module.safetensors", "prefix_module.json"
TRAIN = "train it with recipes/rclrec.py"


@dataclasses.dataclass(frozen=True)
class PrefixSettings:
    """Fails at construction, with one sentence."""

    k: int = 3
    temperature: float = 1.0  # τ
    selection: Selection = "learned"
    target_behaviour: str = "pay"
    user_width: int = 32  # of a user's embedding; 0: users have none
    seed: int = 0  # of the weights at first, and of selection random
    query_start: QueryStart = "context"  # the query before it has learnt: the prompt's last state, or random

    def __post_init__(self):
        if not _whole(self.k) or self.k < 1:
            raise UserError(f"k, the items of a prefix, is {self.k!r}", fix="1 or more; --selection none for no prefix")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"temperature, τ of the selection, must be above 0 and finite, got {self.temperature}")
        if self.selection not in get_args(Selection):
            raise UserError(f"selection {self.selection!r} is not one of {', '.join(get_args(Selection))}")
        if self.query_start not in get_args(QueryStart):
            raise UserError(f"query_start {self.query_start!r} is not one of {', '.join(get_args(QueryStart))}")
        if not _whole(self.user_width) or self.user_width < 0:
            raise UserError(f"user_width must be a whole number from 0, got {self.user_width!r}")
        if not self.target_behaviour:
            raise UserError("the target behaviour has no name", fix="such as pay")

    def as_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def read(cls, value: object) -> "PrefixSettings":
        """From recllm.json; what a later version added is an error, not a silent default."""
        try:
            return cls(**value)
        except TypeError:
            raise UserError(f"the prefix's settings are unknown here: {value}", fix="update recllm") from None


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class PrefixModule(nn.Module):
    """`users`: those with an embedding of their own, which begins at 0; all others are 0 for good (row 0).

    `user_dropout`: the share of users whom a training step takes for unknown, or that row would be new to the query.
    """

    user_dropout = 0.0

    def __init__(self, settings: PrefixSettings, width: int, users: Sequence[str] = ()):
        super().__init__()
        self.settings, self.width = settings, width
        self.users = tuple(users) if self.learned and settings.user_width else ()
        if not self.learned:
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.user_embedding = nn.Embedding(1 + len(self.users), settings.user_width, padding_idx=0)
            nn.init.zeros_(self.user_embedding.weight)  # what is not known of a user is what others have in common
            self.features = nn.Linear(settings.user_width + 2 * width, width)  # W_u
            self.query = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        if settings.query_start == "context":
            self._ask_for_the_context()

    @torch.no_grad()
    def _ask_for_the_context(self) -> None:
        """q = the prompt's last state to begin with, since SiLU(x) − SiLU(−x) = x.

        Events that left the user where he is now are relevant then, and the prefix is worth something from the first
        step on: behind one that a random query has chosen, the model learns not to look at it, and the query nothing.
        """
        first, _, second = self.query
        same, users = torch.eye(self.width), self.settings.user_width
        nn.init.zeros_(self.features.weight[:, users:])  # a user's part stays random, since the embedding begins at 0
        self.features.weight[:, users : users + self.width] = same
        nn.init.zeros_(first.weight)
        first.weight[:, : self.width] = torch.cat([same, -same])
        second.weight.copy_(torch.cat([same, -same], dim=1))
        for layer in (self.features, first, second):
            nn.init.zeros_(layer.bias)

    @property
    def learned(self) -> bool:
        return self.settings.selection == "learned"

    @functools.cached_property
    def _row_of(self) -> dict[str, int]:
        return {user: row for row, user in enumerate(self.users, start=1)}

    def user_rows(self, names: Sequence[str | None]) -> Tensor:
        """0 for a user without an embedding. -> (P,) int64"""
        return torch.tensor([self._row_of.get(name, 0) for name in names], dtype=torch.int64)

    def relevance(self, states: Tensor, mask: Tensor, last: Tensor, behaviour: Tensor, users: Tensor) -> Tensor:
        """s, of a learned selection.   (P, J, D), (P, J) which items there are, (P, D), (D,), (P,) rows -> (P, J)

        `behaviour`: the model's own embedding of the target behaviour's token. In the module's own precision, since
        under autocast items would tie.
        """
        if self.training and self.user_dropout and self.users:
            users = users.masked_fill(torch.rand(users.shape, device=users.device) < self.user_dropout, 0)
        with torch.autocast(states.device.type, enabled=False):
            states, last, behaviour = (part.to(self.features.weight.dtype) for part in (states, last, behaviour))
            there = mask.to(states.dtype).unsqueeze(2)  # (P, J, 1)
            states = states.masked_fill(there == 0, 0.0)
            mean = states.sum(dim=1) / there.sum(dim=1).clamp(min=1)  # 0 of a history without items
            features = self.features(torch.cat([self.user_embedding(users), last, mean], dim=1))  # (P, D)
            query = self.query(torch.cat([features, behaviour.expand_as(features)], dim=1))
            return (states @ query.unsqueeze(2)).squeeze(2) / self.width**0.5

    def choose(
        self, states: Tensor, mask: Tensor, last: Tensor, behaviour: Tensor, users: Tensor,
        keys: Sequence[object] | None = None,
    ) -> Tensor:  # fmt: skip
        """Places of the chosen items, least relevant first, rows of fewer than K begin with -1. -> (P, K)

        `keys`: what selection random depends on beside its seed, one for each prompt; None: the user's row and the
        number of items. It does not depend on the other prompts of a batch.
        """
        if not self.learned:
            return self.without_query(mask, users, keys)
        return ascending_top_k(self.relevance(states, mask, last, behaviour, users), self.settings.k, mask)

    def without_query(self, mask: Tensor, users: Tensor, keys: Sequence[object] | None = None) -> Tensor:
        """The same for the selections that read no state. (P, J), (P,) -> (P, K)"""
        k, (prompts, items) = self.settings.k, mask.shape
        if self.settings.selection == "none":
            return torch.full((prompts, k), ABSENT, device=mask.device)
        scores = torch.arange(items, device=mask.device, dtype=torch.float32).expand(prompts, -1)  # the later, the more
        if self.settings.selection == "random":
            counts = mask.sum(dim=1).tolist()
            own = list(zip(users.tolist(), counts)) if keys is None else keys
            scores = torch.zeros(prompts, items)
            for row, (key, count) in enumerate(zip(own, counts)):
                seed = int(digest(str(self.settings.seed), repr(key))[:8], 16)
                scores[row, mask[row].cpu()] = torch.rand(count, generator=torch.Generator().manual_seed(seed))
            scores = scores.to(mask.device)
        return ascending_top_k(scores, k, mask)

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        with write_whole(folder / WEIGHTS) as partial:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}, partial)
        write_json(
            folder / SETTINGS, {"settings": self.settings.as_json(), "width": self.width, "users": list(self.users)}
        )

    @classmethod
    def load(cls, folder: str | Path) -> "PrefixModule":
        """On the CPU, in evaluation mode."""
        folder = Path(folder)
        weights, about = (require(folder / name, "the prefix module", TRAIN) for name in (WEIGHTS, SETTINGS))
        said = read_object(about)
        try:
            module = cls(PrefixSettings.read(said["settings"]), int(said["width"]), said["users"])
        except (KeyError, TypeError, ValueError):
            raise UserError("says not what the prefix module is", file=about, fix=TRAIN) from None
        try:
            module.load_state_dict(load_file(weights))
        except (SafetensorError, RuntimeError, OSError):  # cut off, or of other shapes
            raise UserError(f"does not hold the module of {SETTINGS}", file=weights, fix=TRAIN) from None
        return module.eval()
