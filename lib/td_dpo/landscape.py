"""The shape of the preference losses: loss, slope and curvature over the margin, drawn from the losses that train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.optimize import brentq

from lib.plots import PALETTE, SOFT, Drawing, canvas, housestyle, legend_below, number
from lib.td_dpo.figures import LOOKS, TEMPERED

Curve = Callable[[np.ndarray], np.ndarray]  # loss per pair as a function of margins (n,), float64
PairLoss = Callable[[np.ndarray, np.ndarray], np.ndarray]  # loss per pair from log p+ and log p- (n,), reference at 0
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))


def pair_loss(name: str, *, beta: float, tau: float = 1.0, anchor: bool = True) -> PairLoss:
    """A loss of lib.td_dpo.losses as a numpy function of log p+ and log p- with the reference at 0.

    `anchor=False` leaves out beta/2 (r+^2 + r-^2), which is not a function of the margin.
    """
    import torch

    from lib.td_dpo.losses import preference_loss

    def loss(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
        p = [torch.as_tensor(np.asarray(v, np.float64)) for v in (chosen, rejected)]
        total, parts = preference_loss(name, *p, torch.zeros_like(p[0]), torch.zeros_like(p[1]), beta=beta, tau=tau)
        return (total if anchor else parts["preference_loss"]).numpy()

    return loss


def margin_curve(name: str, *, beta: float, tau: float = 1.0) -> Curve:
    """The preference term of a loss over the margin in nats (rho; Delta for td_dpo)."""
    loss = pair_loss(name, beta=beta, tau=tau, anchor=False)
    return lambda margin: loss(np.asarray(margin) / 2, -np.asarray(margin) / 2)


def label(name: str, tau: float | None = None) -> str:
    return LOOKS[name].label + (f" τ = {number(tau)}" if name in TEMPERED else "")


def study_curves(beta: float, taus: Sequence[float]) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """The two sides of `loss_landscape` for this study: over z = beta rho, and over the margin in nats at `beta`."""
    plain = ("dpo", "discopop", "discopop_card")
    in_nats = {label(name): margin_curve(name, beta=beta) for name in plain}
    in_nats |= {label("td_dpo", tau): margin_curve("td_dpo", beta=beta, tau=tau) for tau in taus}
    return {label(name): margin_curve(name, beta=1.0) for name in plain[:2]}, in_nats


def study_pair_losses(beta: float, taus: Sequence[float]) -> dict[str, PairLoss]:
    """The losses whose curvature the study compares."""
    plain = {label(name): pair_loss(name, beta=beta) for name in ("dpo", "discopop")}
    return plain | {label("td_dpo", tau): pair_loss("td_dpo", beta=beta, tau=tau) for tau in taus}


def slope(curve: Curve, x: np.ndarray, step: float = 1e-4) -> np.ndarray:
    """Central difference of `curve` at `x`, second order in `step`."""
    return (np.asarray(curve(x + step)) - np.asarray(curve(x - step))) / (2 * step)


def stationary_points(curve: Curve, x: np.ndarray) -> list[tuple[float, str]]:
    """Where the slope of `curve` changes sign on the grid `x`: [(position, "minimum" or "maximum")], refined."""
    values, found = slope(curve, x), []
    for i in np.flatnonzero(values[:-1] * values[1:] < 0):
        root = brentq(lambda v: float(slope(curve, np.array([v]))[0]), x[i], x[i + 1], xtol=1e-9)
        found.append((float(root), "minimum" if values[i] < 0 else "maximum"))
    return found


def _styles(names: Sequence[str]) -> dict[str, tuple[str, object]]:
    """Colour and dash of each curve: the method's own colour, dashes telling its temperatures apart."""
    styles, seen = {}, {}
    for name in names:
        colour = next((own.colour for own in LOOKS.values() if name.split(" τ")[0] == own.label), None)
        colour = colour or PALETTE[(5 + len(styles)) % len(PALETTE)]
        styles[name] = (colour, DASHES[seen.get(colour, 0) % len(DASHES)])
        seen[colour] = seen.get(colour, 0) + 1
    return styles


@housestyle
def loss_landscape(
    scaled: Mapping[str, Curve],
    in_nats: Mapping[str, Curve],
    *,
    beta: float,
    reach: float = 12.0,
    title: str = "The losses and their slopes",
) -> Drawing:
    """Loss (above) and slope (below). Left: `scaled`, functions of z = beta rho near 0, with minima and barriers
    computed and marked. Right: `in_nats`, functions of the margin in nats (rho; Delta for td_dpo) at `beta`.

    A positive slope pushes the margin down.
    """
    drawn, axes = canvas(2, 2, height=6.6, title=title, sharex="col")
    styles, words, data, drawn_curves = _styles(list(dict.fromkeys([*scaled, *in_nats]))), [], [], []
    sides = (
        ("z = β·ρ", np.linspace(-0.6, 0.6, 1201), scaled),
        (f"margin in nats, at β = {number(beta)}", np.linspace(-reach, reach, 1601), in_nats),
    )
    for column, (xlabel, x, curves) in enumerate(sides):
        for name, curve in curves.items():
            (colour, dash), loss, steep = styles[name], np.asarray(curve(x)), slope(curve, x)
            twin = any(c == column and np.allclose(loss, other) for c, other in drawn_curves)
            dash = (0, (2, 2.5)) if twin else dash  # a curve on top of another leaves it visible
            drawn_curves.append((column, loss))
            axes[0, column].plot(x, loss, color=colour, linestyle=dash, label=name if column else None)
            axes[1, column].plot(x, steep, color=colour, linestyle=dash)
            data.append(pd.DataFrame({"axis": xlabel, "curve": name, "x": x, "loss": loss, "slope": steep}))
            zero = np.array([0.0])
            words.append(
                f"{name} over {xlabel}: loss {number(float(curve(zero)[0]))}, "
                f"slope {number(float(slope(curve, zero)[0]))} at 0"
            )
            marks = stationary_points(curve, x)
            words += [
                f"{name} has a {'barrier' if kind == 'maximum' else 'minimum'} at {_signed(at, 3 - column)}"
                for at, kind in marks
            ]
            if column == 0:
                _mark(axes[0, 0], axes[1, 0], curve, marks, colour, beta)
        axes[1, column].axhline(0, color=SOFT, linewidth=0.9)
        axes[1, column].set_xlabel(xlabel)
    low = min(0.0, *(float(np.min(table["loss"])) for table in data))
    axes[0, 1].set_ylim(low - 0.2, 6)
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("slope of the loss")
    legend_below(drawn)
    return Drawing(drawn, title, f"{title}. " + "; ".join(words) + ".", pd.concat(data))


def _mark(above, below, curve: Curve, marks: Sequence[tuple[float, str]], colour: str, beta: float) -> None:
    """Minimum and barrier on the loss, and under them the range between that is pushed the wrong way."""
    for at, kind in marks:
        low = kind == "minimum"
        height = float(curve(np.array([at]))[0])
        above.plot([at], [height], "o" if low else "^", color=colour, markersize=7, zorder=4)
        above.annotate(
            f"{kind if low else 'barrier'}\n{_signed(at, 3)}",
            (at, height),
            xytext=(-6, -30) if low else (6, 8),
            textcoords="offset points",
            fontsize=9,
            ha="right" if low else "left",
            color=colour,
        )
    for (start, kind), (end, _) in zip(marks, marks[1:], strict=False):
        if kind == "minimum":
            below.axvspan(start, end, color=colour, alpha=0.12, linewidth=0)
            below.annotate(
                f"pushed the wrong\nway: ρ from {_signed(start / beta, 1)}\nto {_signed(end / beta, 1)} nats\n"
                f"at β = {number(beta)}",
                (end, 1),
                xycoords=("data", "axes fraction"),
                xytext=(5, -2),
                textcoords="offset points",
                va="top",
                fontsize=9,
                color=colour,
            )


def _signed(value: float, decimals: int) -> str:
    return f"{value:+.{decimals}f}".replace("-", "−")


def hessian_eigenvalues(loss: PairLoss, margin: np.ndarray, step: float = 1e-3) -> np.ndarray:
    """Eigenvalues (n, 2) of the Hessian in (log p+, log p-) at log p+ = -log p- = margin/2, by second differences:
    common mode (1, 1)/sqrt 2 and margin mode (1, -1)/sqrt 2.

    Those are the eigenvectors wherever the loss is f(log p+ - log p-) plus a quadratic that treats both answers alike.
    """

    def second(sign: int) -> np.ndarray:
        shift = step / np.sqrt(2)
        ahead, here, behind = (loss(margin / 2 + s * shift, -margin / 2 + s * sign * shift) for s in (1, 0, -1))
        return (ahead - 2 * here + behind) / step**2

    return np.stack([second(1), second(-1)], axis=1)


@housestyle
def curvature(
    losses: Mapping[str, PairLoss], *, beta: float, reach: float = 10.0, title: str = "Curvature of the losses"
) -> Drawing:
    """Hessian eigenvalues over the margin: what holds the level of both answers (left), what bends the margin
    (right)."""
    margin = np.linspace(-reach, reach, 801)
    drawn, axes = canvas(1, 2, height=4.2, title=title, sharex=True)
    styles, words, data, levels = _styles(list(losses)), [], [], {}
    for name, loss in losses.items():
        values = hessian_eigenvalues(loss, margin)
        values[np.abs(values) < 1e-7] = 0.0  # the rounding of second differences
        for place, mode in zip(axes[0], values.T, strict=True):
            place.plot(margin, mode, color=styles[name][0], linestyle=styles[name][1], label=name)
        common, bend = values[len(margin) // 2]
        levels.setdefault(round(common, 6), []).append(name)
        words.append(
            f"{name}: at margin 0 common mode {number(common)}, margin mode {number(bend)}; "
            f"at {number(reach)} nats margin mode {number(values[-1, 1])}"
        )
        data.append(
            pd.DataFrame({"loss": name, "margin": margin, "common_mode": values[:, 0], "margin_mode": values[:, 1]})
        )
    left, right = axes[0]
    left.set(title="common mode", xlabel="margin (nats)", ylabel=f"Hessian eigenvalue at β = {number(beta)}")
    right.set(title="margin mode", xlabel="margin (nats)")
    left.margins(y=0.35)
    for level, names in levels.items():
        left.annotate(
            ",\n".join([", ".join(names[i : i + 2]) for i in range(0, len(names), 2)]) + f": {number(level)}",
            (-reach, level),
            xytext=(2, 5),
            textcoords="offset points",
            fontsize=9,
            va="bottom",
        )
    legend_below(drawn)
    alt = f"{title} at beta {number(beta)}: eigenvalues of the Hessian. {'; '.join(words)}."
    return Drawing(drawn, title, alt, pd.concat(data))
