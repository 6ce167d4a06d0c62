"""Rows gathered into blocks of one size, and blocks summed: small batches cost no product and no merge each.

Shape suffixes: N rows of a batch, B rows of a block, D features, C targets.
"""

import torch
from torch import Tensor

from linpass.errors import InputError

from .moments import TINY, CentredMoments
from .triangular import TriangularFactor

# Rows of one product. Sums of 4096 products in float32 are as exact as sums of 256 (3e-8 relative; 16,384 give 6e-8),
# and adding the product to the moments in float64 then takes about 2 % of the time of the product.
BLOCK_ROWS, FEWEST_ROWS = 4096, 256
# Most numbers of a block, 67 MB, unless its rows are so long that FEWEST_ROWS take more.
BLOCK_NUMBERS = 2**23
# On a GPU the launches for 4096 rows take several times as long as their product: blocks hold so many times more there.
ON_GPU = {"mixed": 4, "float64": 8, "tsqr": 8}
# What is left of a sum of squares may seem this negative, relative to what there was, when rows that were in it are
# taken out: the rounding of the products, and of their means.
SLACK = {"mixed": 1e-5, "float64": 1e-9}


class Block:
    """Room for the rows of several batches.

    Attributes:
        used: rows that are filled.
        targets: ids [B] where ``num_targets`` is None, else values [B, C].
        weights_B: None until a batch has weights.
    """

    def __init__(self, capacity: int, num_features: int, num_targets: int | None, device: torch.device) -> None:
        self.used = 0
        self.rows_BD = torch.empty(capacity, num_features, dtype=torch.float64, device=device)
        if num_targets is None:
            self.targets = torch.empty(capacity, dtype=torch.int64, device=device)
        else:
            self.targets = torch.empty(capacity, num_targets, dtype=torch.float64, device=device)
        self.weights_B: Tensor | None = None

    @property
    def full(self) -> bool:
        return self.used == len(self.rows_BD)

    def append(self, features_ND: Tensor, targets: Tensor, weights_N: Tensor | None) -> int:
        """Copy as many rows as there is room for; returns how many."""
        count = min(len(features_ND), len(self.rows_BD) - self.used)
        part = slice(self.used, self.used + count)
        self.rows_BD[part].copy_(features_ND[:count])
        self.targets[part].copy_(targets[:count])
        if weights_N is not None and self.weights_B is None:
            self.weights_B = self.rows_BD.new_ones(len(self.rows_BD))
        if self.weights_B is not None and weights_N is None:
            self.weights_B[part] = 1.0
        elif self.weights_B is not None and weights_N is not None:
            self.weights_B[part].copy_(weights_N[:count])
        self.used += count
        return count

    def take(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The rows, targets and weights so far, to be used before the next ``append``."""
        part, self.used = slice(self.used), 0
        return self.rows_BD[part], self.targets[part], None if self.weights_B is None else self.weights_B[part]


class BlockSum:
    """Sums over all rows that came: those of full blocks, and one block under way.

    Batches must have been checked. Nothing here takes part in autograd, and under inference mode the sums stay ordinary
    tensors, so that a pass may begin there and go on elsewhere.
    """

    def __init__(self, num_features: int, num_targets: int, precision: str, device=None, most_rows: int = BLOCK_ROWS):
        self.sizes = {"num_features": num_features, "num_targets": num_targets, "precision": precision}
        self.most_rows = most_rows
        self._device = device
        self._block: Block | None = None
        self._state = self._empty_state()
        self.changes = 0  # counts up: what was computed from the sums holds as long as it stays

    def _empty_state(self) -> CentredMoments | TriangularFactor:
        features, targets, precision = self.sizes.values()
        if precision == "tsqr":
            return TriangularFactor(features, targets, self._device)
        return CentredMoments(features, targets, torch.float32 if precision == "mixed" else torch.float64, self._device)

    def empty_like(self) -> "BlockSum":
        return BlockSum(**self.sizes, device=self.device, most_rows=self.most_rows)

    @property
    def device(self) -> torch.device:
        return self._state.weight.device

    @property
    def rows(self) -> int:
        return self._state.rows + (self._block.used if self._block else 0)

    @torch.inference_mode(False)
    @torch.no_grad()
    def flushed(self) -> CentredMoments | TriangularFactor:
        """The sums with every row in them."""
        if self._block is not None and self._block.used:
            self._state.add(*self._block.take())
        return self._state

    @torch.inference_mode(False)
    @torch.no_grad()
    def append(self, features_ND: Tensor, targets: Tensor, weights_N: Tensor | None) -> None:
        self.changes += 1
        if self._block is None or self._block.targets.ndim != targets.ndim:
            self.flushed()
            self._block = self._new_block(targets)
        while len(features_ND):
            count = self._block.append(features_ND, targets, weights_N)
            features_ND, targets = features_ND[count:], targets[count:]
            weights_N = None if weights_N is None else weights_N[count:]
            if self._block.full:
                self.flushed()

    def _new_block(self, targets: Tensor) -> Block:
        features, classes, precision = self.sizes.values()
        dense = targets.ndim == 2 or precision == "tsqr"
        larger = ON_GPU[precision] if self.device.type == "cuda" else 1
        most = BLOCK_NUMBERS * larger // (features + classes * dense)
        capacity = min(self.most_rows * larger, max(FEWEST_ROWS, most))
        return Block(capacity, features, classes if targets.ndim == 2 else None, self.device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, other: "BlockSum") -> None:
        """Add the rows of ``other``, which stays."""
        self.changes += 1
        other = self.partner(other)
        if other.rows:
            self.flushed().merge(other.flushed())  # pyright: ignore[reportArgumentType]

    @torch.inference_mode(False)
    @torch.no_grad()
    def subtract(self, other: "BlockSum") -> None:
        """Take out the rows of ``other``, for which :meth:`check_contains` has passed."""
        self.changes += 1
        other = self.partner(other)
        if not other.rows:
            return
        mine, theirs = self.flushed(), other.flushed()
        left = mine.rows - theirs.rows
        if left and (mine.weight - theirs.weight).item() > 1e-12 * mine.weight.item():
            mine.merge(theirs, -1)  # pyright: ignore[reportArgumentType, reportCallIssue]
        else:  # nothing is left that weighs anything: exactly nothing, not the rounding of what there was
            self._state = self._empty_state()
            self._state.rows = left

    def check_contains(self, other: "BlockSum") -> None:
        """Raise InputError where the rows of ``other`` cannot all be in these sums."""
        self.check_takes_back()
        other = self.partner(other)
        mine, theirs = self.flushed(), other.flushed()
        if theirs.rows > mine.rows:
            raise InputError(f"rows: {theirs.rows} to take out of {mine.rows}; must not be more than there are")
        slack = SLACK[self.sizes["precision"]]
        weight, taken = mine.weight.item(), theirs.weight.item()
        if taken > weight * (1 + slack):
            raise InputError(f"weight: {taken:g} to take out of {weight:g}; must not be more than there is")
        left = weight - taken
        between = weight * taken / left if left > slack * weight else 0.0
        for name, (mean, scatter), (taken_mean, taken_scatter) in zip(
            ("features", "targets"), _spreads(mine), _spreads(theirs), strict=True
        ):
            rest = scatter - taken_scatter - between * (taken_mean - mean).square()
            # The second term is the scatter that rounding gives to a constant; of class ids it is a mean's, p (1 - p).
            constant = (1e-12 * mean).square() if name == "features" else 1e-14 * mean.square()
            if (rest < -slack * scatter - weight * constant - TINY).any():
                raise InputError(f"{name}: the rows to take out spread wider than all rows; they are not all in here")

    def check_takes_back(self) -> None:
        """Raise InputError where rows can only be added."""
        if self.sizes["precision"] == "tsqr":
            raise InputError('precision="tsqr" cannot take rows back: use "mixed" or "float64"')

    def partner(self, other: "BlockSum") -> "BlockSum":
        """The other sums, on this device.

        Raises:
            InputError: other sizes or another precision.
        """
        for name, mine in self.sizes.items():
            if other.sizes[name] != mine:
                raise InputError(f"{name}: {other.sizes[name]!r} cannot be combined with {mine!r}; must be equal")
        if other.device == self.device:
            return other
        copy = self.empty_like()
        copy.load(other.tensors())
        return copy

    @torch.inference_mode(False)
    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Every weight times ``factor``."""
        self.changes += 1
        self.flushed().scale(factor)

    def tensors(self) -> dict[str, Tensor]:
        """Copies of all sums, and the number of rows."""
        tensors = {name: tensor.clone() for name, tensor in self.flushed().tensors().items()}
        return {"rows": torch.tensor(self.rows), **tensors}

    @torch.inference_mode(False)
    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Become what :meth:`tensors` was taken of.

        Raises:
            InputError: names, shapes or dtypes of another size or precision. Nothing has changed then.
        """
        self.changes += 1
        if "rows" in tensors:  # of versions that counted rows of weight 0 too
            tensors = {"counted": tensors["rows"].double()} | tensors
        mine = {"rows": torch.tensor(0), **self.flushed().tensors()}
        if missing := sorted(mine.keys() - tensors.keys()):
            raise InputError(f"{missing[0]} is missing: not statistics of precision {self.sizes['precision']!r}")
        if unknown := sorted(tensors.keys() - mine.keys()):
            raise InputError(f"{unknown[0]} is unknown: not statistics of precision {self.sizes['precision']!r}")
        for name, tensor in mine.items():
            theirs = tensors[name]
            if theirs.shape != tensor.shape or theirs.dtype != tensor.dtype:
                raise InputError(
                    f"{name}: {theirs.dtype} of shape {tuple(theirs.shape)} must be {tensor.dtype} of shape "
                    f"{tuple(tensor.shape)}"
                )
        for name, tensor in self._state.tensors().items():
            tensor.copy_(tensors[name])
        self._state.rows = int(tensors["rows"])


def _spreads(state: CentredMoments | TriangularFactor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Means and sums of squares about them, of the features and of the targets."""
    return (state.mean_D, state.scatter_DD.diagonal()), (state.target_mean_C, state.target_scatter_C)
