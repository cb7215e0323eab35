# SPDX-License-Identifier: Apache-2.0
"""
The learnable scalar functions of Kolmogorov-Arnold Attention, one class per family of basis functions.

A step of the operator, Phi: R^Q -> R^P, has one scalar function per edge (p, q) and head (paper, section 4):

    Phi(s)_p = sum_q phi_pq(s_q),    phi_pq(x) = scale_base_pq * b(x) + scale_basis_pq * basis_pq(x)

Shapes: h heads, P outputs, Q inputs, T rows (queries). Parameters of an edge are stored as (h, ..., P, Q), so that
the inputs are contiguous. Every function takes its parameters as a dictionary of tensors, because attention also runs
on resampled or cast copies of them.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN


@dataclass(frozen=True)
class Start:
    """
    Where `karat_init="scaled"` starts the functions of a step.

    Args:
        spread: standard deviation of phi_pq(x) to aim at, for x ~ N(0, 1).
        constant: added to phi_pq(0) of the outputs `components`.
        components: a slice of the outputs p.
        base_scale: `scale_base`, where there is a base function.
    """

    spread: float
    constant: float
    components: slice
    base_scale: float = 1.0


class FrozenParameter(nn.Parameter):
    """A parameter that takes no part: it is stored and counted, and requires no gradient, whoever asks for one."""

    requires_grad = property(lambda self: False, lambda self, value: None)

    def requires_grad_(self, requires_grad: bool = True):
        return self

    def __reduce_ex__(self, protocol):
        return type(self), (self.data, False)


class EdgeFunctions(nn.Module):
    """
    Phi: R^in_features -> R^out_features with h x out_features x in_features learnable scalar functions.

    Subclasses name their `family`, as `basis_type` does, and the parameters of their basis in `parameter_names`.

    Args:
        config: a `KArAtViTConfig`.
        heads: number of KArAt heads h.
        in_features, out_features: Q and P.
        start: what `karat_init="scaled"` aims at.
    """

    def __init__(self, config, heads: int, in_features: int, out_features: int, start: "Start"):
        super().__init__()
        self.heads, self.in_features, self.out_features = heads, in_features, out_features
        self.base_fn = config.base_fn
        self.karat_init, self.start = config.karat_init, start
        self.base = None if config.base_fn == "zero" else ACT2FN[config.base_fn]
        self.scale_base = nn.Parameter(torch.ones(heads, out_features, in_features))
        self.scale_basis = nn.Parameter(torch.ones(heads, out_features, in_features))

    def _coefficients(self, *shape: int) -> nn.Parameter:
        """An uninitialised parameter with `shape` numbers per edge, (h, *shape, P, Q)."""
        return nn.Parameter(torch.empty(self.heads, *shape, self.out_features, self.in_features))

    @property
    def floats_per_score(self) -> int:
        """Floats that evaluating Phi keeps per score, to size the chunks of the portable path."""
        raise NotImplementedError

    def basis(self, x: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """basis_pq(x) for `x` of shape (..., h, T, 1 or P, Q): the closed formula, (..., h, T, P, Q)."""
        raise NotImplementedError

    def edges(self, x: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        phi_pq(x) of every edge.

        Args:
            x: (..., h, T, 1 or P, Q), one value per edge or one per input.
            tensors: the parameters, named as in this module.

        Returns:
            (..., h, T, P, Q)
        """
        values = _per_row(tensors["scale_basis"]) * self.basis(x, tensors)
        if self.base is not None:
            values = values + _per_row(tensors["scale_base"]) * self.base(x)
        return values

    def forward(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """
        The parameters by name, cast to `dtype`.

        This, and not the mathematics, is `forward`, because only calling a module makes hooks bring weights that are
        kept elsewhere (accelerate's offloading to memory and disk).
        """
        return {name: parameter.to(dtype) for name, parameter in self._parameters.items() if parameter is not None}

    def activate(
        self,
        x: torch.Tensor,
        tensors: dict[str, torch.Tensor],
        keep: torch.Tensor | None = None,
        lean: bool = False,
    ) -> torch.Tensor:
        """
        Phi of every row of `x`.

        Args:
            x: (..., h, T, Q).
            tensors: the parameters, named as in this module.
            keep: boolean, broadcastable to `x`; inputs that are False contribute nothing.
            lean: use the cheaper arithmetic of the portable path, where the family has one.

        Returns:
            (..., h, T, P)
        """
        values = self.edges(x.unsqueeze(-2), tensors)
        if keep is not None:
            values = values * keep.unsqueeze(-2)
        return values.sum(-1)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as `config.karat_init` says, leaving alone whatever was loaded from a checkpoint."""
        scaled = self.karat_init == "scaled"
        init.ones_(self.scale_basis)
        # N(0, 1) knows no base function.
        init.constant_(self.scale_base, self.start.base_scale if scaled and self.base is not None else 1.0)
        self._reset_basis(self.start if scaled else None)

    def _reset_basis(self, start: "Start | None") -> None:
        """Initialise the basis by `start`, or as N(0, 1)."""
        raise NotImplementedError


class LinearEdgeFunctions(EdgeFunctions):
    """
    Families that are linear in their coefficients: basis_pq(x) = sum_k C_kpq F_k(x). Phi is then a matrix product,
    `sum_k F_k(x) C_k^T`, and the P x Q edges of a row never have to exist.

    The lean arithmetic may take other features L_k of the same span, where they cost fewer passes over the inputs. It
    writes them to memory that is handed to it: fresh memory costs a CPU more than the arithmetic.
    """

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """F_k(x), each of the shape of `x`, in the order of `stack_coefficients`."""
        raise NotImplementedError

    def stack_coefficients(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """C, (h, K, P, Q), without the scales."""
        raise NotImplementedError

    def basis(self, x: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        coefficients = self.stack_coefficients(tensors)
        return sum(_per_row(coefficients[:, index]) * feature for index, feature in enumerate(self.features(x)))

    def _lean_features(self, x: torch.Tensor, out: list[torch.Tensor] | None) -> list[torch.Tensor]:
        """L_k(x) of the basis, in the first tensors of `out` or in new ones."""
        return self.features(x)

    def _lean_stack(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Coefficients of the L_k from those of the F_k, (h, K, P, Q)."""
        return coefficients

    def _lean_features_and_derivatives(self, x: torch.Tensor, out: list[torch.Tensor] | None) -> tuple[list, list]:
        """L_k(x), and functions D_j(x) that span their derivatives."""
        raise NotImplementedError

    def _derivative_stack(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Coefficients of the D_j in d/dx sum_k c_k L_k(x), (h, J, P, Q), from c, (h, K, P, Q)."""
        raise NotImplementedError

    def lean_features(self, x: torch.Tensor, out: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """What Phi is a weighted sum of: the L_k(x), and the base function. `out`: where they go."""
        features = self._lean_features(x, out) + ([] if self.base is None else [self.base(x)])
        return _placed(features, out)

    def lean_features_and_derivatives(
        self, x: torch.Tensor, out: list[torch.Tensor] | None = None
    ) -> tuple[list, list]:
        """`lean_features` without a graph, and what their derivatives are weighted sums of."""
        features, derivatives = self._lean_features_and_derivatives(x, out)
        if self.base is not None:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                base = self.base(x)
                (derivative,) = torch.autograd.grad(base, x, torch.ones_like(base))
            features, derivatives = [*features, base.detach()], [*derivatives, derivative]
        return _placed(features, out), derivatives

    def lean_coefficients(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The weights of `lean_features`, (h, K, P, Q), scales included."""
        coefficients = self._lean_stack(self.stack_coefficients(tensors) * tensors["scale_basis"].unsqueeze(1))
        if self.base is None:
            return coefficients
        return torch.cat([coefficients, tensors["scale_base"].unsqueeze(1)], dim=1)

    def derivative_coefficients(self, coefficients: torch.Tensor) -> torch.Tensor:
        """The weights of the derivatives, (h, J, P, Q), from those of the features, (h, K, P, Q)."""
        if self.base is None:
            return self._derivative_stack(coefficients)
        return torch.cat([self._derivative_stack(coefficients[:, :-1]), coefficients[:, -1:]], dim=1)

    def activate(self, x, tensors, keep=None, lean=False):
        if lean:
            coefficients = self.lean_coefficients(tensors)
            if is_traced():
                features = [_masked(feature, keep) for feature in self.lean_features(x)]
                return sum(feature @ coefficients[:, index].transpose(1, 2) for index, feature in enumerate(features))
            return _FeatureProduct.apply(self, x, keep, coefficients)
        coefficients = self.stack_coefficients(tensors) * tensors["scale_basis"].unsqueeze(1)
        features = self.features(x)
        y = sum(_masked(f, keep) @ coefficients[:, index].transpose(1, 2) for index, f in enumerate(features))
        if self.base is not None:
            y = y + _masked(self.base(x), keep) @ tensors["scale_base"].transpose(1, 2)
        return y


def is_traced() -> bool:
    """
    Whether a compiler, the tracer of an exporter or a transform of `torch.func` looks on. They differentiate and plan
    memory themselves, do not look into an autograd function of ours, and have no values to ask for.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()


def weights_of(matrices: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """The weights (M, P, K * Q) of K features, zero for inputs q that `keep`, (M, 1, Q), leaves out."""
    if keep is None:
        return matrices
    return (matrices.unflatten(2, (-1, keep.shape[-1])) * keep.unsqueeze(-2)).flatten(2)


def weighted_sum(features: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """
    y^T = sum_k C_k F_k^T, as one product. The few outputs are its rows, and the inputs the rows of the features,
    because matrix products want the long sides to be contiguous.

    Args:
        features: (M, K * Q, T), for M maps.
        weights: (M, P, K * Q).

    Returns:
        (M, P, T)
    """
    return torch.bmm(weights, features)


def weighted_sum_backward_x(derivatives, slopes, dy, out, product):
    """
    dx^T = sum_j D_j^T * (dy C'_j)^T.

    Args:
        derivatives: J of (M, Q, T), which span the derivatives of the features.
        slopes: their weights, (M, P, J * Q).
        dy: gradient of y^T, (M, P, T).
        out, product: (M, Q, T), where the result and the products go.

    Returns:
        `out`
    """
    if not derivatives:  # constant functions
        return out.zero_()
    first, *rest = slopes.mT.split(out.shape[1], dim=1)
    torch.bmm(first, dy, out=out).mul_(derivatives[0])
    for derivative, slope in zip(derivatives[1:], rest):
        out.addcmul_(torch.bmm(slope, dy, out=product), derivative)
    return out


def weighted_sum_backward_weights(features, dy, keep) -> torch.Tensor:
    """dC = dy^T F of every map, (M, P, K * Q), for `features`, (M, K * Q, T), and `dy`, (M, P, T)."""
    return weights_of(torch.bmm(dy, features.mT), keep)


class _FeatureProduct(torch.autograd.Function):
    """sum_k F_k(x) C_k^T with the derivative written out: both passes share the features."""

    @staticmethod
    def forward(ctx, family, x, keep, coefficients):
        ctx.family, ctx.shape = family, x.shape
        # The heads of all images, one map behind the other.
        x = x.flatten(0, -3).mT.contiguous()
        keep = None if keep is None else keep.expand(*ctx.shape[:-2], 1, -1).flatten(0, -3)
        features = x.new_empty(x.shape[0], coefficients.shape[1], *x.shape[1:])
        places, derivatives = list(features.unbind(1)), []
        if ctx.needs_input_grad[1]:
            _, derivatives = family.lean_features_and_derivatives(x, places)
        else:
            family.lean_features(x, places)
        ctx.save_for_backward(keep, coefficients, features, *derivatives)
        y = weighted_sum(features.flatten(1, 2), weights_of(_of_maps(coefficients, len(x)), keep))
        return y.mT.unflatten(0, ctx.shape[:-2])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        keep, coefficients, features, *derivatives = ctx.saved_tensors
        dy = dy.flatten(0, -3).mT
        dx = d_coefficients = None
        if ctx.needs_input_grad[1]:
            slopes = weights_of(_of_maps(ctx.family.derivative_coefficients(coefficients), len(dy)), keep)
            out, product = torch.empty_like(features[:, 0]), torch.empty_like(features[:, 0])
            dx = weighted_sum_backward_x(derivatives, slopes, dy, out, product).mT.unflatten(0, ctx.shape[:-2])
        if ctx.needs_input_grad[3]:
            products = weighted_sum_backward_weights(features.flatten(1, 2), dy, keep)
            d_coefficients = products.unflatten(0, (-1, ctx.family.heads)).sum(0)
            d_coefficients = d_coefficients.unflatten(2, features.shape[1:3]).transpose(1, 2)
        return None, dx, None, d_coefficients


def _of_maps(coefficients: torch.Tensor, maps: int) -> torch.Tensor:
    """(h, K, P, Q) as the weights of M maps, (M, P, K * Q)."""
    return coefficients.transpose(1, 2).flatten(2).repeat(maps // coefficients.shape[0], 1, 1)


class FourierEdges(LinearEdgeFunctions):
    """sum_{m=1..G} a_m cos(m x) + b_m sin(m x): integer frequencies, no constant term (paper, equation 4)."""

    family = "fourier"
    parameter_names = ("cos_coef", "sin_coef")

    def __init__(self, config, heads, in_features, out_features, start):
        super().__init__(config, heads, in_features, out_features, start)
        self.grid_size = config.grid_size
        self.cos_coef = self._coefficients(self.grid_size)
        self.sin_coef = self._coefficients(self.grid_size)

    @property
    def floats_per_score(self) -> int:
        return 4 * self.grid_size

    def features(self, x):
        harmonics = range(1, self.grid_size + 1)
        return [torch.cos(m * x) for m in harmonics] + [torch.sin(m * x) for m in harmonics]

    def _lean_features(self, x, out):
        # One sine and one cosine, and 2 cos(x) cos(mx) - cos((m-1)x) = cos((m+1)x), the same for the sine. With the
        # factors in `_lean_stack`, each further harmonic is one pass over the inputs.
        out = out or [None] * (2 * self.grid_size)
        cos_out, sin_out = out[: self.grid_size], out[self.grid_size :]
        if self.grid_size > 1 and cos_out[1] is not None and _is_plain(x):
            cos, sin = [cos_out[0]], [sin_out[0]]
            _cos_and_sin(x, cos[0], sin[0], scratch=cos_out[1])
        else:
            cos, sin = [torch.cos(x, out=cos_out[0])], [torch.sin(x, out=sin_out[0])]
        first = cos[0]
        for m in range(1, self.grid_size):
            if m == 1:
                minus_half = torch.full((), -0.5, dtype=x.dtype, device=x.device)
                cos.append(torch.addcmul(minus_half, first, first, out=cos_out[1]))
                sin.append(torch.mul(first, sin[0], out=sin_out[1]))
            else:
                weight = -4 if m % 2 == 0 else 1
                cos.append(torch.addcmul(cos[m - 2], first, cos[m - 1], value=weight, out=cos_out[m]))
                sin.append(torch.addcmul(sin[m - 2], first, sin[m - 1], value=weight, out=sin_out[m]))
        return cos + sin

    def _lean_stack(self, coefficients):
        # F_m over L_m: 1, 2, -1, -2, 1, ...
        ratios = [(1, 2, -1, -2)[m % 4] for m in range(self.grid_size)] * 2
        return coefficients * coefficients.new_tensor(ratios).view(-1, 1, 1)

    def _lean_features_and_derivatives(self, x, out):
        features = self._lean_features(x, out)
        return features, features

    def _derivative_stack(self, coefficients):
        cos, sin = coefficients.chunk(2, dim=1)
        harmonics = torch.arange(1, self.grid_size + 1, device=cos.device, dtype=cos.dtype).view(-1, 1, 1)
        return torch.cat([harmonics * sin, -harmonics * cos], dim=1)

    def stack_coefficients(self, tensors):
        return torch.cat([tensors["cos_coef"], tensors["sin_coef"]], dim=1)

    def _reset_basis(self, start):
        for parameter in (self.cos_coef, self.sin_coef):
            values = _normal_like(parameter)
            if start is not None:
                harmonics = torch.arange(1, self.grid_size + 1, device=values.device, dtype=values.dtype)
                values = values * (start.spread / self.grid_size**0.5 / harmonics**2).view(-1, 1, 1)
                if parameter is self.cos_coef:
                    values[:, 0, start.components] += start.constant
            init.copy_(parameter, values)


class SplineEdges(LinearEdgeFunctions):
    """sum_i c_i B_i(x): G + k B-splines of degree k on a uniform grid, extended by k knots on each side (as pykan)."""

    family = "spline"
    parameter_names = ("spline_coef",)

    def __init__(self, config, heads, in_features, out_features, start):
        super().__init__(config, heads, in_features, out_features, start)
        self.grid_size, self.order = config.grid_size, config.spline_order
        self.low, self.high = config.grid_range
        self.spline_coef = self._coefficients(self.grid_size + self.order)

    @property
    def floats_per_score(self) -> int:
        return 3 * (self.grid_size + self.order)

    def _cardinal(self, x: torch.Tensor, order: int) -> list[torch.Tensor]:
        """B-splines of degree `order` on the knots of the full order, by the Cox-de Boor recursion."""
        # In units of the knot spacing the knots are 0, 1, ..., G + 2k.
        u = (x - self.low) * (self.grid_size / (self.high - self.low)) + self.order
        splines = [((u >= i) & (u < i + 1)).to(x.dtype) for i in range(self.grid_size + 2 * self.order)]
        for k in range(1, order + 1):
            splines = [((u - i) * splines[i] + (i + k + 1 - u) * splines[i + 1]) / k for i in range(len(splines) - 1)]
        return splines

    def features(self, x):
        return self._cardinal(x, self.order)

    def _lean_features_and_derivatives(self, x, out):
        if self.order == 0:
            return self.features(x), []
        lower = self._cardinal(x, self.order - 1)
        u = (x - self.low) * (self.grid_size / (self.high - self.low)) + self.order
        features = [
            ((u - i) * lower[i] + (i + self.order + 1 - u) * lower[i + 1]) / self.order for i in range(len(lower) - 1)
        ]
        return features, lower

    def _derivative_stack(self, coefficients):
        if self.order == 0:
            return coefficients[:, :0]
        # B'_i = (lower_i - lower_{i+1}) / spacing
        none = torch.zeros_like(coefficients[:, :1])
        slope = self.grid_size / (self.high - self.low)
        return slope * coefficients.diff(dim=1, prepend=none, append=none)

    def stack_coefficients(self, tensors):
        return tensors["spline_coef"]

    def _reset_basis(self, start):
        values = _normal_like(self.spline_coef)
        if start is not None:
            values = values * start.spread
            # The splines sum to one inside the grid.
            values[:, :, start.components] += start.constant
        init.copy_(self.spline_coef, values)


class WaveletEdges(EdgeFunctions):
    """
    w psi((x - tau) / s), with the mother wavelets of Wav-KAN. tau starts at 0 and s at 1, and both are learned.

    Shannon's Hamming window runs along the inputs q; it is a function of their number, so it is not stored.
    """

    family = "wavelet"
    parameter_names = ("amplitude", "translation", "width")

    def __init__(self, config, heads, in_features, out_features, start):
        super().__init__(config, heads, in_features, out_features, start)
        self.wavelet_type = config.wavelet_type
        self.amplitude = self._coefficients()
        self.translation = self._coefficients()
        self.width = self._coefficients()

    @property
    def floats_per_score(self) -> int:
        return 8 * self.out_features

    def mother(self, x: torch.Tensor) -> torch.Tensor:
        """psi(x), elementwise; for Shannon of shape (..., Q), because of the window."""
        if self.wavelet_type == "mexican_hat":
            return 2 / (math.sqrt(3) * math.pi**0.25) * (x * x - 1) * torch.exp(-x * x / 2)
        if self.wavelet_type == "morlet":
            return torch.cos(5 * x) * torch.exp(-x * x / 2)
        if self.wavelet_type == "dog":
            return x * torch.exp(-x * x / 2)
        if self.wavelet_type == "meyer":
            t = x.abs()
            # Clamping keeps the branch that is not taken finite: 0 * inf would poison the gradient.
            v = (2 * t - 1).clamp(0, 1)
            nu = v**4 * (35 - 84 * v + 70 * v**2 - 20 * v**3)
            return torch.where(t < 1, torch.sin(math.pi * t) * torch.cos(math.pi / 2 * nu), torch.zeros_like(x))
        return _sinc(x) * self.window(x)

    def window(self, like: torch.Tensor) -> torch.Tensor:
        """omega, the Hamming window over the inputs, (Q,)."""
        if like.shape[-1] == 1:
            return torch.ones(1, dtype=like.dtype, device=like.device)
        position = torch.arange(like.shape[-1], dtype=like.dtype, device=like.device) / (like.shape[-1] - 1)
        return 0.54 - 0.46 * torch.cos(2 * math.pi * position)

    def basis(self, x, tensors):
        x = (x - _per_row(tensors["translation"])) / _per_row(tensors["width"])
        return _per_row(tensors["amplitude"]) * self.mother(x)

    def _reset_basis(self, start):
        amplitude = _normal_like(self.amplitude)
        translation = torch.zeros_like(amplitude)
        if start is not None:
            amplitude = amplitude * start.spread
            if self.wavelet_type == "dog":  # peaks at 1, where it is exp(-1/2)
                translation[:, start.components] = -1.0
                amplitude[:, start.components] += start.constant * math.exp(0.5)
            elif self.wavelet_type == "meyer":  # peaks at 1/2, where it is 1
                translation[:, start.components] = -0.5
                amplitude[:, start.components] += start.constant
            else:
                amplitude[:, start.components] += (
                    start.constant / self.mother(torch.zeros_like(amplitude))[:, start.components]
                )
        init.copy_(self.amplitude, amplitude)
        init.copy_(self.translation, translation)
        init.ones_(self.width)


class RationalEdges(EdgeFunctions):
    """(a_0 + ... + a_m x^m) / (1 + |b_1 x + ... + b_n x^n|), the safe Pade form."""

    family = "rational"
    parameter_names = ("numerator", "denominator")

    def __init__(self, config, heads, in_features, out_features, start):
        super().__init__(config, heads, in_features, out_features, start)
        self.rational_order = degree, denominator_degree = config.rational_order
        self.numerator = self._coefficients(degree + 1)
        self.denominator = self._coefficients(denominator_degree) if denominator_degree else None

    @property
    def floats_per_score(self) -> int:
        return 4 * self.out_features * (self.numerator.shape[1] + 2)

    def basis(self, x, tensors):
        value = _polynomial(x, tensors["numerator"])
        if self.denominator is not None:
            value = value / (1 + (x * _polynomial(x, tensors["denominator"])).abs())
        return value

    def _reset_basis(self, start):
        for parameter, first in ((self.numerator, 0), (self.denominator, 1)):
            if parameter is None:
                continue
            values = _normal_like(parameter)
            if start is not None:
                # Damped like a Taylor series, so that strong scores do not make the high powers dominate.
                count = values.shape[1]
                damping = torch.tensor([1 / math.factorial(j + first) for j in range(count)])
                values = values * (damping / count**0.5).to(values).view(-1, 1, 1)
                if parameter is self.numerator:
                    values = values * start.spread
                    values[:, 0, start.components] += start.constant
            init.copy_(parameter, values)


def make_edges(config, heads: int, in_features: int, out_features: int, start: Start) -> EdgeFunctions:
    """Phi: R^in_features -> R^out_features of the family that `config.basis_type` names."""
    families = {"fourier": FourierEdges, "spline": SplineEdges, "wavelet": WaveletEdges, "rational": RationalEdges}
    return families[config.basis_type](config, heads, in_features, out_features, start)


def _per_row(parameter: torch.Tensor) -> torch.Tensor:
    """(h, P, Q) as (h, 1, P, Q): the same for every row."""
    return parameter.unsqueeze(1)


def _polynomial(x: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """c_0 + c_1 x + ... by Horner's rule, for coefficients (h, degree + 1, P, Q)."""
    value = _per_row(coefficients[:, -1])
    if coefficients.shape[1] == 1:  # a constant is one of every row, too
        value = value.expand(torch.broadcast_shapes(value.shape, x.shape))
    for index in range(coefficients.shape[1] - 2, -1, -1):
        value = value * x + _per_row(coefficients[:, index])
    return value


# sqrt(2) cos(theta/2) and sqrt(2) sin(theta/2) / theta as polynomials in theta^2, for |theta| <= pi, at the Chebyshev
# nodes: to 7e-8 and 3e-9. As tensors, because `addcmul` takes no numbers.
_HALF_COS, _HALF_SIN = (
    torch.tensor(numbers, dtype=torch.float32, device="cpu").unbind()
    for numbers in (
        [1.4142134961897637, -0.1767763593776916, 3.6825747375371556e-3, -3.061253773005056e-5, 1.279026598713708e-7],
        [0.7071067781541845, -0.0294627671634163, 3.682722800671e-4, -2.188609695470143e-6, 7.1957421799024675e-9],
    )
)
_ONE = torch.ones((), dtype=torch.float32, device="cpu")


def _is_plain(x: torch.Tensor) -> bool:
    """Whether `x` is what `_cos_and_sin` is for: in fp32 on a CPU, and no fake tensor."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and type(x) is torch.Tensor


def _cos_and_sin(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scratch: torch.Tensor) -> None:
    """
    cos(x) and sin(x) in fp32, into `cos` and `sin`: seventeen passes of simple arithmetic, which take three fifths of
    the time of `torch.cos` and `torch.sin`. To 6e-7 up to 1e4, to 3e-5 up to 1e7; beyond, they are bounded.
    """
    # theta = x - 2 pi n. The first part of 2 pi has so few bits that its product with n is exact.
    turns = torch.mul(x, 0.5 / math.pi, out=cos).round_()
    theta = torch.sub(x, turns, alpha=6.28125, out=sin).sub_(turns, alpha=2 * math.pi - 6.28125)
    theta.clamp_(-math.pi, math.pi)
    square = torch.mul(theta, theta, out=scratch)
    half_sin = _horner(square, _HALF_SIN, out=cos).mul_(theta)
    half_cos = _horner(square, _HALF_COS, out=sin)
    half_cos.mul_(half_sin)  # 2 sin(theta/2) cos(theta/2), in `sin`
    torch.addcmul(_ONE, half_sin, half_sin, value=-1, out=cos)  # 1 - 2 sin(theta/2)^2


def _horner(x: torch.Tensor, coefficients: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
    """c_0 + c_1 x + ... into `out`."""
    *lower, last = coefficients
    torch.add(lower[-1], x, alpha=last.item(), out=out)
    for coefficient in reversed(lower[:-1]):
        torch.addcmul(coefficient, out, x, out=out)
    return out


def _sinc(x: torch.Tensor) -> torch.Tensor:
    """sin(x) / x, with a derivative that does not cancel near 0, where scores are at the start of training."""
    near = x.abs() < 0.25
    y = torch.where(near, x, torch.zeros_like(x)) ** 2
    series = 1 - y / 6 * (1 - y / 20 * (1 - y / 42 * (1 - y / 72 * (1 - y / 110))))
    far = torch.where(near, torch.ones_like(x), x)
    return torch.where(near, series, torch.sin(far) / far)


def _placed(features: list[torch.Tensor], out: list[torch.Tensor] | None) -> list[torch.Tensor]:
    """`features` in `out`, if that is given: those that are not there yet are copied."""
    if out is None:
        return features
    for feature, place in zip(features, out, strict=True):
        if feature is not place:
            place.copy_(feature)
    return out


def _masked(values: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    return values if keep is None else values * keep


def _normal_like(parameter: torch.Tensor) -> torch.Tensor:
    """A fresh N(0, 1) tensor: the flags of the parameter, which protect loaded weights, stay behind."""
    return torch.empty_like(parameter.data).normal_()
