"""Influence read while a policy trains: the inner product of each row's gradient with directions of low rank.

With G = sum_t g_t a_t^T a row's gradient of a weight and D = L R a direction of rank r,

    <G, D> = sum_t <L^T g_t, R a_t>,

r (n_in + n_out) multiplications a token beside the n_in n_out of the weight's own gradient. An embedding has a_t = the
token's unit vector, so that L^T a_t is a row of L; a vector's gradient meets a vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cropi.gradients.layer_taps import Layer, gradients_tapped, normalised, readable_layers, tapped
from cropi.parallel import process_group


@dataclass(frozen=True)
class LowRank:
    """A matrix of low rank, left @ right."""

    left: Float[Tensor, "n_out r"]
    right: Float[Tensor, "r n_in"]


TOLERANCE = 0.05  # of what is read, against a gradient that is known
Direction = Mapping[str, LowRank | Tensor]
"""A direction in weight space by parameter name: a matrix as its factors, a vector as it is. A parameter that is
missing has direction 0."""


class Reader:
    """Reads <gradient of a row, direction> for several directions in passes that run anyway.

    `reading` encloses the forward and backward pass of a micro-batch; `take` returns what was read since. The gradient
    is that of the loss which the pass differentiates: the caller undoes its normaliser. Rows are sequences: the first
    dimension of every layer's output, which has tokens and width besides. A layer whose output has not, such as an
    expert of a mixture, is not read. `exclude_unfaithful` finds what is read wrongly for any other reason.
    """

    def __init__(self, model: nn.Module, directions: Sequence[Direction]) -> None:
        """PolicyError for a compiled model."""
        self._layers = readable_layers(model)
        self._count = len(directions)
        self._matrices: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._vectors: dict[str, Tensor] = {}
        self._cast: dict[tuple[str, torch.dtype], tuple[Tensor, Tensor]] = {}
        for name in sorted({name for layer in self._layers for name in layer.parameters}):
            self._stack(name, [direction.get(name) for direction in directions])
        self._rows: Tensor | None = None
        self._found: list[Tensor] = []  # by layer, rows x directions
        self._taken: list[tuple[Tensor, Tensor]] = []
        # of each parameter over the rows of checked passes: what was read, what its gradient gives, its squared norm
        self._checked = False
        self._totals: dict[str, Tensor] = {}
        self._expected: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._numbers: dict[str, int] = {}
        self._missed: set[str] = set()
        self.read_parameters: set[str] = set()  # names of those that are read whole, once that was checked

    def _stack(self, name: str, own: Sequence[LowRank | Tensor | None]) -> None:
        """Put the factors of all directions side by side, with the direction that each rank belongs to."""
        matrices = [(n, part) for n, part in enumerate(own) if isinstance(part, LowRank)]
        vectors = {n: part for n, part in enumerate(own) if not isinstance(part, LowRank | None)}
        if matrices:
            left = torch.cat([part.left for _, part in matrices], 1).float()
            right = torch.cat([part.right for _, part in matrices], 0).float()
            places = [n for n, part in matrices for _ in range(part.left.shape[1])]
            belongs = torch.zeros(len(places), self._count, device=left.device)
            belongs[torch.arange(len(places)), torch.tensor(places)] = 1
            self._matrices[name] = left, right, belongs
        if vectors:
            zero = torch.zeros_like(next(iter(vectors.values())))
            self._vectors[name] = torch.stack([vectors.get(n, zero) for n in range(self._count)]).float()

    @property
    def products(self) -> int:
        """Multiply-adds a token: r (n_in + n_out) for every matrix that is read and direction of rank r."""
        linear = {layer.weight for layer in self._layers if layer.kind == "linear"}
        read = [factors for name, factors in self._matrices.items() if name in linear]
        return sum(left.shape[1] * (left.shape[0] + right.shape[1]) for left, right, _ in read)

    @contextmanager
    def reading(self, rows: Int[Tensor, " B"], checked_in: nn.Module | None = None) -> Iterator[None]:
        """Read one micro-batch, whose sequences are these rows. Encloses its forward and its backward pass.

        `checked_in`: the model, for `exclude_unfaithful` to compare this pass with the gradients of its parameters.
        """
        self._rows, self._checked = rows, checked_in is not None
        try:
            with ExitStack() as stack:
                if checked_in is not None:
                    stack.enter_context(gradients_tapped(checked_in, self._compare))
                known = self._matrices.keys() | self._vectors.keys()
                stack.enter_context(tapped([one for one in self._layers if known.intersection(one.parameters)], self))
                yield
            if self._found:
                device = self._found[0].device  # of a model on several, that of one of its layers
                self._taken.append((rows.cpu(), torch.stack([part.to(device) for part in self._found]).sum(0).cpu()))
        finally:
            self._rows, self._found = None, []

    def take(self) -> tuple[Int[Tensor, " M"], Float[Tensor, "M directions"]]:
        """Rows and their inner products since the last call. A row that came several times has several lines."""
        taken, self._taken = self._taken, []
        if not taken:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, self._count)
        return torch.cat([rows for rows, _ in taken]), torch.cat([values for _, values in taken])

    def exclude_unfaithful(self) -> tuple[list[str], float]:
        """Stop reading parameters for which the sum over rows is not <gradient, direction>, by the checked passes.

        Returns their names, and the share of the passes' squared gradient norms that lies in parameters which are read:
        NaN without a gradient or where it overflowed; below one half, influence does not stand for a prompt. An error
        counts beyond `TOLERANCE` times |<g, D>| + |g| |D| / sqrt(n), its size for an unrelated direction. A weight that
        a fused loss or a kernel uses without calling its layer is found by this. Collective: the sums are those of all
        processes.
        """
        own = [{k: v.double().cpu() for k, v in part.items()} for part in (self._totals, self._expected, self._squares)]
        parts = process_group().gather((own, self._missed))
        totals, expected, squares = sums = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
        for theirs, _ in parts:
            for total, part in zip(sums, theirs, strict=True):
                for name, value in part.items():
                    _add_to(total, name, value)
        whole = float(sum(squares.values()))
        if not 0 < whole < float("inf"):
            self._totals, self._expected, self._squares = {}, {}, {}
            return [], float("nan")
        self._missed = set().union(*(missed for _, missed in parts))
        found = []
        for name in sorted(totals.keys() & squares.keys()):
            by_chance = (squares[name] / self._numbers[name]).sqrt() * self._lengths(name).double().cpu()
            if bool(((totals[name] - expected[name]).abs() > TOLERANCE * (by_chance + expected[name].abs())).any()):
                found.append(name)
        self._missed.update(found)
        self._layers = [layer for layer in self._layers if not self._missed.intersection(layer.parameters)]
        self.read_parameters = totals.keys() - self._missed
        read = float(sum(value for name, value in squares.items() if name in self.read_parameters))
        return found, read / whole

    def _compare(self, name: str, gradient: Tensor) -> None:
        """Take a parameter's gradient of the rows of a checked pass."""
        whole = gradient.float()
        self._numbers[name] = whole.numel()
        _add_to(self._squares, name, whole.square().sum())
        if name in self._vectors or name in self._matrices:
            _add_to(self._expected, name, self._against(name, whole))

    def _against(self, name: str, gradient: Tensor) -> Tensor:
        """Inner products of a parameter's gradient with the directions."""
        if name in self._vectors:
            return self._vectors[name] @ gradient
        left, right, belongs = self._matrices[name]
        return ((left * (gradient @ right.T)).sum(0)) @ belongs

    def _lengths(self, name: str) -> Tensor:
        """Norms of a parameter's directions."""
        if name in self._vectors:
            return self._vectors[name].norm(dim=1)
        left, right, belongs = self._matrices[name]
        squares = (left.T @ left) * (right @ right.T)
        return torch.einsum("rd,rs,sd->d", belongs, squares, belongs).clamp(min=0).sqrt()

    # What a tap does

    def keep(self, layer: Layer, read: Tensor) -> tuple[Tensor, ...]:
        if layer.kind == "linear" and layer.weight in self._matrices:
            _, right = self._factors(layer.weight, read.dtype)
            return ((read @ right.T).float(),)
        return (read,) if layer.kind != "linear" else ()

    def meet(self, layer: Layer, gradient: Tensor, *kept: Tensor) -> None:
        assert self._rows is not None, "a backward pass belongs inside the block of its forward pass"
        if gradient.dim() < 3 or len(gradient) != len(self._rows):
            self._missed.update(layer.parameters)
            return
        tokens = gradient.flatten(1, -2)
        if layer.weight in self._matrices:
            self._add(layer.weight, self._matrix_products(layer.weight, layer, tokens, kept[0]))
        elif layer.weight in self._vectors:
            per_row = (tokens.float() * normalised(layer, kept[0]).reshape(tokens.shape)).sum(1)
            self._add(layer.weight, per_row @ self._vectors[layer.weight].T)
        if layer.bias in self._vectors:
            self._add(layer.bias, tokens.sum(1, dtype=torch.float32) @ self._vectors[layer.bias].T)

    def _matrix_products(self, name: str, layer: Layer, tokens: Tensor, kept: Tensor) -> Tensor:
        """Rows x directions."""
        left, right = self._factors(name, tokens.dtype)
        belongs = self._matrices[name][2]
        if layer.kind == "embedding":  # y = s E[i]: row i of E's gradient is s times the sum of g_t over the tokens i
            ids = kept.flatten(1)
            scale = float(getattr(layer.module, "embed_scale", 1.0))  # Gemma's
            if (padding := getattr(layer.module, "padding_idx", None)) is not None:  # autograd gives it no gradient
                tokens = tokens * (ids != padding)[..., None]
            return (left[ids].float() * (tokens @ right.T).float()).sum(1) @ belongs * scale
        return ((tokens @ left).float() * kept.flatten(1, -2)).sum(1) @ belongs

    def _factors(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Both factors in the type of what they meet: half precision is several times as fast."""
        if (name, dtype) not in self._cast:
            left, right, _ = self._matrices[name]
            self._cast[name, dtype] = left.to(dtype), right.to(dtype)
        return self._cast[name, dtype]

    def _add(self, name: str, values: Tensor) -> None:
        if self._checked:
            _add_to(self._totals, name, values.sum(0))
        self._found.append(values)


def _add_to(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value
