"""Trained weights as linear maps: what presynaptic activity, postsynaptic signal and weights are to each kind of layer.

A linear layer's input vector is its input; a convolution's is the patch under its kernel, once for every position; a
transposed convolution's is a pixel's channels; a recurrent layer's are its input and its hidden state, once for every
step; a bilinear layer's is the product of its two inputs; an embedding's is one-hot. A bias is the weight of one more
input, which is always 1.
The groups of a grouped convolution share one input space.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMALISATION = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.LayerNorm, nn.GroupNorm)


class GatedLayer:
    """One weight matrix of a module, with its bias: a linear map of input vectors that the module's forward pass has.

    This class is the map of a linear layer.

    Args:
        module: its forward pass has the input vectors.
        weight, bias: names of the parameters; None for a map without bias.
        owner: the module that has them. Default: ``module``.

    Attributes:
        per_row: whether the gradient in the module's output is that in the map's output. If not, the gradients of the
            stream's rows and of stored samples can't be told apart.
        projects_attention: whether it makes the queries, keys or values of an attention.
        of_rows: whether its input vectors are one-hot, so that each of them is the place of a row of the weight.
        groups: of a grouped convolution.
        name: of the map within its module; "" for a module's only one.
    """

    per_row = True
    projects_attention = False
    of_rows = False
    groups = 1
    name = ""
    module: Any  # of the class's kind

    def __init__(
        self, module: nn.Module, weight: str = "weight", bias: str | None = "bias", owner: nn.Module | None = None
    ):
        self.module, self.owner = module, module if owner is None else owner
        self._weight, self._bias = weight, bias

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self.owner, self._weight)

    @property
    def bias(self) -> nn.Parameter | None:
        return None if self._bias is None else getattr(self.owner, self._bias)

    @property
    def trains(self) -> bool:
        """Whether the weight is a trainable parameter; one that is computed (a parametrisation, pruning) is none."""
        return self.is_own and self.weight.requires_grad

    @property
    def is_own(self) -> bool:
        """Whether the weight is a parameter."""
        return self.owner._parameters.get(self._weight) is not None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weight, and the bias if there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def trained_parameters(self) -> list[nn.Parameter]:
        """Those of them that train."""
        return [p for p in self.parameters if p.requires_grad]

    @property
    def units(self) -> int:
        """Number of the map's outputs, over all groups."""
        return len(self.weight)

    @property
    def inputs(self) -> int:
        """Number of the map's inputs, without the bias's."""
        return prod(self.weight.shape[1:])

    # What differs from kind to kind.

    def input_of(self, args: tuple, kwargs: Mapping[str, Any], output: Any) -> Tensor | None:
        """The map's input in a forward pass of the module, a sample a row of dimension 0; None if it is not known.

        Args:
            args, kwargs, output: of the forward pass.
        """
        return _argument("input", 0, args, kwargs)

    def _matrix(self, weight: Tensor) -> Tensor:
        """A view of the weight, or of its gradient, whose first dimensions are units and whose last are inputs."""
        return weight

    def _of_bias(self, bias: Tensor) -> Tensor:
        """The part of the bias, or of its gradient, that is this map's."""
        return bias

    def presynaptic(self, x: Tensor) -> Tensor:
        """The input vectors, one a row.

        Args:
            x: the map's input; (..., in_features) of a linear layer, (n, channels, ...) of a convolution.

        Returns:
            Shape (rows, d): d is the number of weights that an output unit has, its bias among them.
        """
        return self._with_ones(x.reshape(-1, self.inputs))

    def presynaptic_at(self, x: Tensor, places: Tensor) -> Tensor:
        """``presynaptic(x)[places]``; of a convolution's patches only these are laid out."""
        return self.presynaptic(x)[places]

    def energy(self, x: Tensor) -> Tensor:
        """``presynaptic(x).square().sum()``, 0-dim; a linear layer's input vectors not being laid out."""
        flat = x.flatten()
        return flat.dot(flat) + (x.numel() // self.inputs if self.bias is not None else 0)

    def project(self, x: Tensor, vectors: Tensor) -> Tensor:
        """``presynaptic(x) @ vectors``, a convolution's patches never being laid out.

        Args:
            x: as above.
            vectors: V, shape (d, r).

        Returns:
            Shape (rows, r); (groups, rows, r) of a grouped convolution.
        """
        inputs = self.inputs
        projection = x.reshape(-1, inputs) @ vectors[:inputs]
        return projection if self.bias is None else projection.add_(vectors[-1])

    def power(self, x: Tensor, vectors: Tensor) -> Tensor:
        """The energy of the input vectors along each vector: shape (r,)."""
        return self.project(x, vectors).square().flatten(0, -2).sum(0)

    def uses(self, x: Tensor) -> Tensor:
        """How often ``x`` uses each row of the weight: shape (d,). Only of a map that is ``of_rows``."""
        raise NotImplementedError

    def postsynaptic(self, delta: Tensor) -> Tensor:
        """The gradient in the map's output, one row for each of its input vectors.

        Args:
            delta: the gradient in the module's output, if it is ``per_row``.

        Returns:
            Shape (rows, out); (groups, rows, out / groups) of a grouped convolution.
        """
        return delta.reshape(-1, delta.shape[-1])

    def explains(self, x: Tensor, output: Any) -> bool:
        """Whether the weight's gradient is that of the map. A subclass's ``forward`` may use the weight otherwise.

        Args:
            x, output: the map's input and the module's output in a forward pass, with its graph.
        """
        if not _is_overridden(self.module):
            return True
        if not isinstance(output, Tensor):
            return False
        delta = torch.arange(output.numel(), device=output.device).cos().to(output).view_as(output)
        (grad,) = torch.autograd.grad(output, self.weight, delta, retain_graph=True, allow_unused=True)
        if grad is None:
            return False
        size = self.inputs + (self.bias is not None), 4
        vectors = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(output)
        vectors[self.inputs :] = 0  # the bias's
        try:
            found = (self.postsynaptic(delta).mT @ self.project(x.detach(), vectors)).flatten(0, -2)
        except RuntimeError:  # other shapes
            return False
        expected = self._along(grad, None, vectors)
        return bool((found - expected).norm() <= _EXPLAINED * expected.norm())

    def _with_ones(self, rows: Tensor) -> Tensor:
        return rows if self.bias is None else torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)

    # The rest is of the matrix alone.

    def along(self, vectors: Tensor) -> Tensor:
        """The weights along each vector, W V: shape (out, r)."""
        return self._along(self.weight.detach(), None if self.bias is None else self.bias.detach(), vectors)

    def gradient_along(self, vectors: Tensor) -> Tensor:
        """And their gradient; no gradient is zeros."""
        weight, bias = self.weight, self.bias
        grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        return self._along(grad, None if bias is None else bias.grad, vectors)

    def _along(self, weight: Tensor, bias: Tensor | None, vectors: Tensor) -> Tensor:
        weight = self._matrix(weight)
        if weight.dim() > 2:
            weight = weight.reshape(self.units, -1)
        weight = weight.to(vectors.dtype)
        product = weight @ vectors[: weight.shape[1]]
        return product if bias is None else product.addr_(self._of_bias(bias).to(vectors.dtype), vectors[-1])

    def add_along(self, coordinates: Tensor, vectors: Tensor) -> None:
        """Moves the weights by ``coordinates`` (out, r) along the vectors, in place: W + coordinates V^T.

        A frozen bias stays.
        """
        _add_product(self._matrix(self.weight.detach()), coordinates, vectors[: self.inputs].T)
        if self.bias is not None and self.bias.requires_grad:
            _add_product(self._of_bias(self.bias.detach()), coordinates, vectors[-1])

    def gate_gradient(self, held: Tensor, vectors: Tensor, open_rest: float = 1.0) -> None:
        """Takes ``held`` (out, r) along the vectors from the gradient, in place: open_rest * grad - held V^T.

        No gradient is left alone.
        """
        grad, bias = self.weight.grad, self.bias
        if grad is None:
            return
        _add_product(self._matrix(grad), held, vectors[: self.inputs].T, beta=open_rest, alpha=-1)
        if bias is not None and bias.grad is not None:
            _add_product(self._of_bias(bias.grad), held, vectors[-1], beta=open_rest, alpha=-1)

    def part_along(self, parameter: nn.Parameter, grad: Tensor, vectors: Tensor) -> Tensor:
        """The gradient of the weight, or of the bias, along each vector: shape (out, r)."""
        if parameter is self.bias:
            return torch.outer(self._of_bias(grad).to(vectors.dtype), vectors[-1])
        return self._along(grad, None, vectors)

    def gated_gradient(self, grad: Tensor, held: Tensor, vectors: Tensor, open_rest: float) -> Tensor:
        """``open_rest * grad - held V^T`` for the gradient of the weight or of the bias (out,)."""
        grad = grad.clone()
        if grad.dim() > 1:
            _add_product(self._matrix(grad), held, vectors[: self.inputs].T, beta=open_rest, alpha=-1)
        else:
            _add_product(self._of_bias(grad), held, vectors[-1], beta=open_rest, alpha=-1)
        return grad

    def scale_gradient(self, factor: float) -> None:
        """Multiplies the layer's gradient, in place."""
        for parameter in self.trained_parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def add_to_gradient(self, rows: Tensor, weight: Tensor) -> None:
        """Adds weight (0-dim) times (rows, d) to the gradient of the first output units, in place.

        No gradient is left alone.
        """
        grad, bias = self.weight.grad, self.bias
        if grad is None:
            return
        grad = self._matrix(grad)[: len(rows)]
        grad.addcmul_(rows[:, : self.inputs].reshape(grad.shape), weight.to(grad))
        if bias is not None and bias.grad is not None:
            self._of_bias(bias.grad)[: len(rows)].addcmul_(rows[:, -1], weight.to(grad))

    def drift_from(self, rows: Tensor) -> Tensor:
        """How far the first output units' weights are from such (rows, d), in place of these."""
        inputs = self.inputs
        rows.neg_()[:, :inputs].add_(self._matrix(self.weight.detach())[: len(rows)].reshape(len(rows), inputs))
        if self.bias is not None:
            rows[:, -1].add_(self._of_bias(self.bias.detach())[: len(rows)])
        return rows

    def weights_and_bias(self) -> Tensor:
        """A copy of the weights in the coordinates of the input vectors: shape (out, d), float32."""
        weight = self._matrix(self.weight.detach()).reshape(self.units, -1).float()
        if self.bias is None:
            return weight.clone()
        return torch.cat([weight, self._of_bias(self.bias.detach()).float().unsqueeze(1)], 1)

    def set_weights(self, rows: Tensor) -> None:
        """Puts such weights (rows, d) into the first output units, in place. A frozen bias stays."""
        weight = self._matrix(self.weight.detach())[: len(rows)]
        weight.copy_(rows[:, : self.inputs].reshape(weight.shape))
        if self.bias is not None and self.bias.requires_grad:
            self._of_bias(self.bias.detach())[: len(rows)].copy_(rows[:, -1])


def _add_product(rows: Tensor, a: Tensor, b: Tensor, beta: float = 1.0, alpha: float = 1.0) -> None:
    """beta * rows + alpha * a b, in place; rows (out, ...), or a vector (out,), of any type."""
    if rows.dtype == a.dtype and rows.dim() == 2:
        rows.addmm_(a, b, beta=beta, alpha=alpha)
    elif rows.dtype == a.dtype and rows.dim() == 1:
        rows.addmv_(a, b, beta=beta, alpha=alpha)
    else:
        rows.mul_(beta).add_((a @ b).view_as(rows), alpha=alpha)


def _argument(name: str, place: int, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """An argument of a forward pass, however it was given; None without it."""
    return args[place] if place < len(args) else kwargs.get(name)


class _InputsFirst(GatedLayer):
    """A linear layer whose weight is (inputs, units): ``Conv1D`` of Hugging Face's GPT-2."""

    @property
    def units(self) -> int:
        return self.weight.shape[1]

    @property
    def inputs(self) -> int:
        return self.weight.shape[0]

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.T


class _Bilinear(GatedLayer):
    """x1^T W_k x2: linear in the products of two inputs."""

    def input_of(self, args: tuple, kwargs: Mapping[str, Any], output: Any) -> Tensor:
        first, second = (_argument(f"input{i + 1}", i, args, kwargs) for i in range(2))
        return (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2)


class _Rows(_InputsFirst):
    """Input vectors say how often each row of the weight is used, so it has an input a row. Padding is none."""

    def __init__(self, module: Any):
        super().__init__(module, bias=None)


class _EmbeddingBag(_Rows):
    """The sums or means of an embedding's rows, a bag a sample."""

    def input_of(self, args: tuple, kwargs: Mapping[str, Any], output: Any) -> Tensor:
        places, offsets, weights = (
            _argument(name, i, args, kwargs) for i, name in enumerate(("input", "offsets", "per_sample_weights"))
        )
        x = output.new_zeros(len(output), self.inputs)
        each = torch.arange(places.numel(), device=x.device)
        which = each // places.shape[1] if places.dim() == 2 else torch.bucketize(each, offsets, right=True) - 1
        used = (which < len(x)) & (places.flatten() != self.module.padding_idx)
        weights = x.new_ones(len(each)) if weights is None else weights.detach().flatten()
        x.index_put_((which[used], places.flatten()[used]), weights[used], accumulate=True)
        return x / x.sum(1, keepdim=True).clamp_min(1) if self.module.mode == "mean" else x


class _Embedding(_Rows):
    """An embedding: a linear map of one-hot vectors. Vectors are coordinate axes, given by the places (r,) of rows.

    Its output is often shared by all samples (positions), so stored samples' part of the gradient can't be told apart.
    """

    per_row = False
    of_rows = True

    def uses(self, x: Tensor) -> Tensor:
        uses = torch.bincount(x.flatten(), minlength=self.inputs).float()
        if self.module.padding_idx is not None:
            uses[self.module.padding_idx] = 0
        return uses

    def energy(self, x: Tensor) -> Tensor:
        return self.uses(x).sum()

    def power(self, x: Tensor, vectors: Tensor) -> Tensor:
        return self.uses(x)[vectors]

    def _along(self, weight: Tensor, bias: Tensor | None, vectors: Tensor) -> Tensor:
        return weight[vectors].T.float()

    def add_along(self, coordinates: Tensor, vectors: Tensor) -> None:
        weight = self.weight.detach()
        weight.index_add_(0, vectors, coordinates.T.to(weight))

    def gate_gradient(self, held: Tensor, vectors: Tensor, open_rest: float = 1.0) -> None:
        grad = self.weight.grad
        if grad is not None:
            grad.mul_(open_rest).index_add_(0, vectors, held.T.to(grad), alpha=-1)


class _Convolution(GatedLayer):
    """A convolution of one, two or three dimensions."""

    def __init__(self, module: Any, bias: str | None = "bias"):
        super().__init__(module, bias=bias)
        self.groups = module.groups
        self._dimensions = len(module.kernel_size)
        self._convolve = (F.conv1d, F.conv2d, F.conv3d)[self._dimensions - 1]

    def input_of(self, args: tuple, kwargs: Mapping[str, Any], output: Any) -> Tensor:
        """With the padding that the ``forward`` of a subclass adds ("same" for strides, as TensorFlow has it)."""
        x, module = _argument("input", 0, args, kwargs), self.module
        x = self._batched(x)
        if not _is_overridden(module):
            return x
        missing: list[int] = []
        padding = module._reversed_padding_repeated_twice[::-1]
        for i, (size, made) in enumerate(zip(x.shape[2:], output.shape[-self._dimensions :])):
            needed = (made - 1) * module.stride[i] + module.dilation[i] * (module.kernel_size[i] - 1) + 1
            lacks = max(needed - size - padding[2 * i] - padding[2 * i + 1], 0)
            missing = [lacks // 2, lacks - lacks // 2, *missing]
        return F.pad(x, missing)

    def _padded(self, x: Tensor) -> Tensor:
        padding, mode = self.module._reversed_padding_repeated_twice, self.module.padding_mode  # "same" too
        if not any(padding):
            return x
        return F.pad(x, padding, "constant" if mode == "zeros" else mode)

    def _by_group(self, x: Tensor) -> Tensor:
        """(n, channels, ...) to (n * groups, channels / groups, ...)."""
        return x.reshape(-1, self.module.in_channels // self.groups, *x.shape[2:])

    def _patches(self, x: Tensor) -> Tensor:
        """A view of the patches, (n * groups, channels / groups, *positions, *kernel)."""
        return self._windows(self._by_group(self._padded(x)))

    def _windows(self, maps: Tensor) -> Tensor:
        """A view of the kernel's windows on maps (n, c, ...): (n, c, *positions, *kernel)."""
        module = self.module
        for dim, (kernel, stride, dilation) in enumerate(zip(module.kernel_size, module.stride, module.dilation), 2):
            maps = maps.unfold(dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
        return maps

    def _batched(self, maps: Tensor) -> Tensor:
        """Maps with a dimension for samples, also of a single sample."""
        return maps if maps.dim() == self._dimensions + 2 else maps.unsqueeze(0)

    def presynaptic(self, x: Tensor) -> Tensor:
        rows = self._patches(x).movedim(1, 1 + self._dimensions)
        return self._with_ones(rows.reshape(-1, self.inputs))

    def presynaptic_at(self, x: Tensor, places: Tensor) -> Tensor:
        patches = self._patches(x)
        index: list[Tensor] = []
        for size in reversed(patches.shape[2 : 2 + self._dimensions]):
            index, places = [places % size, *index], places // size
        chosen: tuple[Tensor | slice, ...] = (places, slice(None), *index)
        return self._with_ones(patches[chosen].flatten(1))

    def energy(self, x: Tensor) -> Tensor:
        flat = self.presynaptic(x).flatten()
        return flat.dot(flat)

    def project(self, x: Tensor, vectors: Tensor) -> Tensor:
        kernels = vectors[: self.inputs].T.reshape(-1, *self.weight.shape[1:])
        bias = None if self.bias is None else vectors[-1]
        stride, dilation = self.module.stride, self.module.dilation
        projection = self._convolve(self._by_group(self._padded(x)), kernels, bias, stride=stride, dilation=dilation)
        return self._rows(projection.reshape(len(x), -1, *projection.shape[2:]))

    def postsynaptic(self, delta: Tensor) -> Tensor:
        return self._rows(self._batched(delta))

    def _rows(self, maps: Tensor) -> Tensor:
        """Maps (n, groups * c, ...) to rows (n * positions, c), a leading dimension for groups if there are any."""
        rows = maps.reshape(len(maps), self.groups, -1, maps[0, 0].numel()).permute(1, 0, 3, 2)
        rows = rows.reshape(self.groups, -1, rows.shape[-1])
        return rows if self.groups > 1 else rows[0]


class _TransposedConvolution(_Convolution):
    """A transposed convolution: a pixel's channels make a patch of the output. Its bias is not part of the map."""

    def __init__(self, module: Any):
        super().__init__(module, bias=None)
        self.per_row = all(more < stride for more, stride in zip(module.output_padding, module.stride))

    @property
    def units(self) -> int:
        return self.groups * prod(self.weight.shape[1:])

    @property
    def inputs(self) -> int:
        return self.module.in_channels // self.groups

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.unflatten(0, (self.groups, -1)).movedim(1, -1)

    def input_of(self, args: tuple, kwargs: Mapping[str, Any], output: Any) -> Tensor:
        return self._batched(_argument("input", 0, args, kwargs))

    def presynaptic(self, x: Tensor) -> Tensor:
        return self._by_group(x).flatten(2).mT.reshape(-1, self.inputs)

    presynaptic_at = GatedLayer.presynaptic_at

    def project(self, x: Tensor, vectors: Tensor) -> Tensor:
        return self._rows(x) @ vectors

    def postsynaptic(self, delta: Tensor) -> Tensor:
        padding = [p for size in reversed(self.module.padding) for p in (size, size)]
        patches = self._windows(F.pad(self._batched(delta), padding))
        patches = patches.unflatten(1, (self.groups, -1)).flatten(3, 2 + self._dimensions).flatten(4)
        rows = patches.permute(1, 0, 3, 2, 4)  # groups, samples, positions, channels, kernel
        rows = rows.reshape(self.groups, -1, self.units // self.groups)
        return rows if self.groups > 1 else rows[0]


class _Recurrent(GatedLayer):
    """The input or hidden weights of one layer and direction of a recurrent network.

    Args:
        which: "ih" or "hh".
        layer: its number.
        reverse: whether it runs from the end.
    """

    per_row = False

    def __init__(self, module: nn.RNNBase, which: str, layer: int, reverse: bool):
        self.name = f"weight_{which}_l{layer}" + "_reverse" * reverse
        super().__init__(module, self.name, self.name.replace("weight", "bias") if module.bias else None)
        self._which, self._layer, self._reverse = which, layer, reverse

    def input_of(self, args: tuple, kwargs: Mapping[str, Any], output: Any) -> Tensor | None:
        """None for packed sequences. The layers below are run once more, without dropout."""
        module, x, states = self.module, _argument("input", 0, args, kwargs), _argument("hx", 1, args, kwargs)
        if not isinstance(x, Tensor):
            return None
        made, states = output[0], states if states is None or isinstance(states, tuple) else (states,)
        if x.dim() == 2:
            x, made = x.unsqueeze(0), made.unsqueeze(0)
            states = states and tuple(s.unsqueeze(1) for s in states)
        elif not module.batch_first:
            x, made = x.transpose(0, 1), made.transpose(0, 1)
        directions = 2 if module.bidirectional else 1
        own = [slice(i * directions, (i + 1) * directions) for i in range(self._layer + 1)]
        for i in range(self._layer + (self._which == "hh") if module.num_layers > 1 else 0):
            weights = [w for direction in module.all_weights[own[i]] for w in direction]
            single = _twin(
                module, num_layers=1, input_size=x.shape[-1], batch_first=True, dropout=0.0, _flat_weights=weights
            )
            hx = states and tuple(s[own[i]].contiguous() for s in states)
            made = single.forward(x, hx[0] if hx is not None and len(hx) == 1 else hx)[0]
            x = made if i < self._layer else x
        if self._which == "ih":
            return x
        made = made.unflatten(-1, (directions, -1))[:, :, int(self._reverse)]
        first = made.new_zeros(made[:, :1].shape)
        if states is not None:
            first = states[0][own[-1]][int(self._reverse)].unsqueeze(1).to(made)
        return torch.cat([made[:, 1:], first] if self._reverse else [first, made[:, :-1]], 1)


class _Cell(GatedLayer):
    """The input or hidden weights of a recurrent cell; ``which`` is "ih" or "hh"."""

    per_row = False

    def __init__(self, module: nn.RNNCellBase, which: str):
        self.name = f"weight_{which}"
        super().__init__(module, self.name, f"bias_{which}" if module.bias else None)
        self._which = which

    def input_of(self, args: tuple, kwargs: Mapping[str, Any], output: Any) -> Tensor:
        x, state = _argument("input", 0, args, kwargs), _argument("hx", 1, args, kwargs)
        if self._which == "hh":
            state = state[0] if isinstance(state, tuple) else state
            x = x.new_zeros(*x.shape[:-1], self.inputs) if state is None else state
        return x if x.dim() > 1 else x.unsqueeze(0)


class _Projection(GatedLayer):
    """A projection of an attention's queries, keys and values, or the packed one of all three.

    Input vectors of the packed one are all its different inputs.

    Args:
        weight: the parameter's name.
        of: places of its inputs among query, key and value.
    """

    per_row = False
    projects_attention = True

    def __init__(self, module: nn.MultiheadAttention, weight: str, of: Sequence[int]):
        self.name, self._of = weight, of
        super().__init__(module, weight, None if module.in_proj_bias is None else "in_proj_bias")

    def _of_bias(self, bias: Tensor) -> Tensor:
        size = self.module.embed_dim
        return bias[self._of[0] * size : (self._of[-1] + 1) * size]

    def input_of(self, args: tuple, kwargs: Mapping[str, Any], output: Any) -> Tensor:
        given = [_argument(("query", "key", "value")[i], i, args, kwargs) for i in self._of]
        different = [x for i, x in enumerate(given) if not any(x is earlier for earlier in given[:i])]
        return torch.cat([_batch_first(self.module, x) for x in different], 1)


class _OutputProjection(GatedLayer):
    """The output projection of an attention, which never calls it: its input is computed once more."""

    per_row = False
    name = "out_proj"

    def __init__(self, module: nn.MultiheadAttention):
        super().__init__(module, owner=module.out_proj)

    def input_of(self, args: tuple, kwargs: Mapping[str, Any], output: Any) -> Tensor:
        weight = self.weight.detach()
        identity = SimpleNamespace(weight=torch.eye(len(weight)).to(weight), bias=torch.zeros(len(weight)).to(weight))
        heads = _twin(self.module, out_proj=identity).forward(*args, **kwargs)[0]
        return _batch_first(self.module, heads)


def _batch_first(module: nn.MultiheadAttention, x: Tensor) -> Tensor:
    if x.dim() == 2:
        return x.unsqueeze(0)
    return x if module.batch_first else x.transpose(0, 1)


def _twin(module: nn.Module, **changes: Any) -> Any:
    """A module in evaluation mode with the same parameters, and with other attributes. Call its ``forward``."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__, training=False, **changes)
    return twin


_CONVOLUTION = nn.Conv1d, nn.Conv2d, nn.Conv3d
_TRANSPOSED = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
_RECURRENT, _CELL = (nn.RNN, nn.LSTM, nn.GRU), (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
_OTHERS = nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention
_FORWARDS = {kind.forward for kind in (*_CONVOLUTION, *_TRANSPOSED, *_RECURRENT, *_CELL, *_OTHERS)}
_EXPLAINED = 0.05  # of a gradient may differ by rounding


def _is_overridden(module: nn.Module) -> bool:
    """Whether its ``forward`` is not that of torch's layer."""
    return type(module).forward not in _FORWARDS or "forward" in vars(module)


def _maps(module: nn.Module) -> Iterable[GatedLayer]:
    """A module's own weights that can be gated."""
    if isinstance(module, nn.Linear):
        return [GatedLayer(module)]
    if isinstance(module, _CONVOLUTION):
        return [_Convolution(module)]
    if isinstance(module, _TRANSPOSED):
        return [_TransposedConvolution(module)]
    if isinstance(module, nn.Bilinear):
        return [_Bilinear(module)]
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return [_InputsFirst(module)]
    if _is_overridden(module):  # the input vectors are not known
        return []
    if isinstance(module, nn.Embedding):
        return [] if module.sparse else [_Embedding(module)]  # a sparse gradient can't be gated
    if isinstance(module, nn.EmbeddingBag):
        is_linear = module.mode != "max" and not module.scale_grad_by_freq
        return [_EmbeddingBag(module)] if is_linear and not module.sparse else []
    if isinstance(module, _RECURRENT):
        places = [(i, back) for i in range(module.num_layers) for back in (False, True)[: 1 + module.bidirectional]]
        return [_Recurrent(module, which, *place) for place in places for which in ("ih", "hh")]
    if isinstance(module, _CELL):
        return [_Cell(module, which) for which in ("ih", "hh")]
    if isinstance(module, nn.MultiheadAttention):
        separate = [_Projection(module, f"{part}_proj_weight", [i]) for i, part in enumerate("qkv")]
        packed = [_Projection(module, "in_proj_weight", range(3))]
        return [*(packed if module._qkv_same_embed_dim else separate), _OutputProjection(module)]
    return []


def gated_layers(model: nn.Module, frozen: Container[str] = ()) -> dict[str, GatedLayer]:
    """The trainable weights that the coincidence gate knows, by name; of frozen ones those that are named.

    The name is the module's, followed by the parameter's if a module has several: ``"recurrent.weight_ih_l0"``. A
    weight that is computed from other parameters (a parametrisation, pruning) is none of them. An embedding whose
    weight is another layer's also is gated as that layer.
    """
    found: dict[str, GatedLayer] = {}
    for name, module in model.named_modules():
        for layer in _maps(module):
            found.setdefault(".".join(part for part in (name, layer.name) if part), layer)
    weights = [layer.weight for layer in found.values() if not layer.of_rows and layer.trains]
    tied = {name for name, layer in found.items() if layer.of_rows and any(layer.weight is w for w in weights)}
    return {n: layer for n, layer in found.items() if n not in tied and (layer.trains or n in frozen and layer.is_own)}


def ungated_parameters(model: nn.Module, gated: Iterable[GatedLayer]) -> dict[str, list[nn.Parameter]]:
    """All other trainable parameters but those of normalisation layers, by name.

    The name is the module's, or the parameter's if it is the network's own or if others of the module are gated.
    """
    known, found = {p for layer in gated for p in layer.parameters}, dict[str, list[nn.Parameter]]()
    for name, module in model.named_modules():
        if isinstance(module, NORMALISATION):
            continue
        own = {n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad}
        others = {n: p for n, p in own.items() if p not in known}
        for n, p in others.items():
            path = name if name and len(others) == len(own) else f"{name}.{n}".lstrip(".")
            found.setdefault(path.split(".parametrizations")[0], []).append(p)
    return found
