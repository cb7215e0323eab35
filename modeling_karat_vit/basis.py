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
    Values at which `karat_init="scaled"` starts the functions of a step.

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
    """Parameter that is stored and counted, and requires no gradient, whoever asks for one."""

    requires_grad = property(lambda self: False, lambda self, value: None)

    def requires_grad_(self, requires_grad: bool = True):
        return self

    def __reduce_ex__(self, protocol):
        return type(self), (self.data, False)


class EdgeFunctions(nn.Module):
    """
    Step Phi: R^in_features -> R^out_features with h x out_features x in_features learnable scalar functions.

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

    def basis(self, x: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Compute basis_pq(x), (..., h, T, P, Q), by its closed formula, for `x` of shape (..., h, T, 1 or P, Q)."""
        raise NotImplementedError

    def edges(self, x: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Compute phi_pq(x) of every edge.

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
        Give the parameters by name, cast to `dtype`.

        This, and not the mathematics, is `forward`, because only calling a module makes hooks bring weights that are
        kept elsewhere (accelerate's offloading to memory and disk).
        """
        # `to` takes its time also where there is nothing to do.
        return {
            name: parameter if parameter.dtype == dtype else parameter.to(dtype)
            for name, parameter in self._parameters.items()
            if parameter is not None
        }

    def activate(
        self, x: torch.Tensor, tensors: dict[str, torch.Tensor], keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Compute Phi of every row of `x`.

        Args:
            x: (..., h, T, Q).
            tensors: the parameters, named as in this module.
            keep: boolean, broadcastable to `x`; inputs that are False contribute nothing.

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
    Step of a family that is linear in its coefficients: basis_pq(x) = sum_k C_kpq F_k(x). Phi is then a matrix product,
    `sum_k F_k(x) C_k^T`, and the P x Q edges of a row never have to exist.
    """

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Compute F_k(x), each of the shape of `x`, in the order of `stack_coefficients`."""
        raise NotImplementedError

    def stack_coefficients(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Stack the coefficients, C, (h, K, P, Q), without the scales."""
        raise NotImplementedError

    def basis(self, x: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        coefficients = self.stack_coefficients(tensors)
        first, *rest = (_per_row(coefficients[:, k]) * feature for k, feature in enumerate(self.features(x)))
        return sum(rest, first)

    def activate(self, x, tensors, keep=None):
        coefficients = self.stack_coefficients(tensors) * tensors["scale_basis"].unsqueeze(1)
        y = sum(_masked(f, keep) @ coefficients[:, k].transpose(1, 2) for k, f in enumerate(self.features(x)))
        if self.base is not None:
            y = y + _masked(self.base(x), keep) @ tensors["scale_base"].transpose(1, 2)
        return y


class FourierEdges(LinearEdgeFunctions):
    """Fourier series sum_{m=1..G} a_m cos(m x) + b_m sin(m x), without a constant term (paper, equation 4)."""

    family = "fourier"
    parameter_names = ("cos_coef", "sin_coef")

    def __init__(self, config, heads, in_features, out_features, start):
        super().__init__(config, heads, in_features, out_features, start)
        self.grid_size = config.grid_size
        self.cos_coef = self._coefficients(self.grid_size)
        self.sin_coef = self._coefficients(self.grid_size)

    def features(self, x):
        harmonics = range(1, self.grid_size + 1)
        return [torch.cos(m * x) for m in harmonics] + [torch.sin(m * x) for m in harmonics]

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
    """Splines sum_i c_i B_i(x): G + k B-splines of degree k on a uniform grid, k knots beyond each side (as pykan)."""

    family = "spline"
    parameter_names = ("spline_coef",)

    def __init__(self, config, heads, in_features, out_features, start):
        super().__init__(config, heads, in_features, out_features, start)
        self.grid_size, self.order = config.grid_size, config.spline_order
        self.low, self.high = config.grid_range
        self.spline_coef = self._coefficients(self.grid_size + self.order)

    def splines(self, x: torch.Tensor, degree: int) -> list[torch.Tensor]:
        """Compute the B-splines of `degree` on the knots of the full degree, by the Cox-de Boor recursion."""
        u = self.in_knots(x)
        splines = [((u >= i) & (u < i + 1)).to(x.dtype) for i in range(self.grid_size + 2 * self.order)]
        for k in range(1, degree + 1):
            splines = self.next_degree(splines, u, k)
        return splines

    def in_knots(self, x: torch.Tensor) -> torch.Tensor:
        """Express `x` in units of the knot spacing, where the knots are 0, 1, ..., G + 2k."""
        return (x - self.low) * (self.grid_size / (self.high - self.low)) + self.order

    @staticmethod
    def next_degree(splines: list[torch.Tensor], u: torch.Tensor, k: int) -> list[torch.Tensor]:
        """Compute the B-splines of degree k at `u`, in knots, from those of degree k - 1."""
        return [((u - i) * splines[i] + (i + k + 1 - u) * splines[i + 1]) / k for i in range(len(splines) - 1)]

    def features(self, x):
        return self.splines(x, self.order)

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
    Wavelets w psi((x - tau) / s), with the mother functions of Wav-KAN. tau starts at 0, s at 1, and both are learned.

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

    def mother(self, x: torch.Tensor) -> torch.Tensor:
        """Compute psi(x), elementwise; for Shannon of shape (..., Q), because of the window."""
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
        """Compute omega, the Hamming window over the inputs, (Q,)."""
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
            # The constant is the wavelet's peak; that of DOG is at 1, of Meyer's at 1/2, of the others at 0.
            peak = {"dog": 1.0, "meyer": 0.5}.get(self.wavelet_type, 0.0)
            translation[:, start.components] -= peak
            height = self.mother(torch.full_like(amplitude, peak))[:, start.components]
            amplitude[:, start.components] += start.constant / height
        init.copy_(self.amplitude, amplitude)
        init.copy_(self.translation, translation)
        init.ones_(self.width)


class RationalEdges(EdgeFunctions):
    """Rational functions (a_0 + ... + a_m x^m) / (1 + |b_1 x + ... + b_n x^n|), the safe Pade form."""

    family = "rational"
    parameter_names = ("numerator", "denominator")

    def __init__(self, config, heads, in_features, out_features, start):
        super().__init__(config, heads, in_features, out_features, start)
        self.rational_order = degree, denominator_degree = config.rational_order
        self.numerator = self._coefficients(degree + 1)
        self.denominator = self._coefficients(denominator_degree) if denominator_degree else None

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
    """Make Phi: R^in_features -> R^out_features of the family that `config.basis_type` names."""
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


def _sinc(x: torch.Tensor) -> torch.Tensor:
    """sin(x) / x, with a derivative that does not cancel near 0, where scores are at the start of training."""
    near = x.abs() < 0.25
    y = torch.where(near, x, torch.zeros_like(x)) ** 2
    series = 1 - y / 6 * (1 - y / 20 * (1 - y / 42 * (1 - y / 72 * (1 - y / 110))))
    far = torch.where(near, torch.ones_like(x), x)
    return torch.where(near, series, torch.sin(far) / far)


def _masked(values: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    return values if keep is None else values * keep


def _normal_like(parameter: torch.Tensor) -> torch.Tensor:
    """A fresh N(0, 1) tensor: the flags of the parameter, which protect loaded weights, stay behind."""
    return torch.empty_like(parameter.data).normal_()
