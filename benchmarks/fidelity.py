"""How far the two forms of the structure loss are from float64, in value and gradient, at three distances.

785 tokens of 384 channels that are much alike, as those of one image are. Both forms in float32, as relative errors
against the matrix form in float64, the largest over five roundings of the same numbers; the last two columns are the
factored form's error over the matrix form's.

    python benchmarks/fidelity.py
"""

import torch

import vitfeats as vf

TOKENS, DIM = 785, 384


def main() -> None:
    """Print a row for each distance."""
    print("    MSE  matrix value  gradient  factored value  gradient  ratio value  gradient")
    for mse in (1e-2, 1e-4, 1e-6):
        k, t = pair_at(mse, torch.Generator().manual_seed(1))
        errors = {form: worst_errors(k, t, form) for form in ("matrix", "factored")}
        (mv, mg), (fv, fg) = errors["matrix"], errors["factored"]
        print(f"{mse:7.0e}  {mv:12.2e} {mg:9.2e}  {fv:14.2e} {fg:9.2e}  {fv / mv:11.2f}  {fg / mg:8.2f}")


def pair_at(mse: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float64 (out, target) whose structure loss is ``mse``, found by bisection on the noise between them."""
    common = torch.randn(1, DIM, generator=generator, dtype=torch.float64)
    basis = torch.randn(20, DIM, generator=generator, dtype=torch.float64)
    target = common + torch.randn(TOKENS, 20, generator=generator, dtype=torch.float64) @ basis / 3
    noise = torch.randn(TOKENS, DIM, generator=generator, dtype=torch.float64)
    low, high = 0.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        smaller = float(loss(target + middle * noise, target, "matrix")) < mse
        low, high = (middle, high) if smaller else (low, middle)
    return target + high * noise, target


def worst_errors(k: torch.Tensor, t: torch.Tensor, form: str) -> tuple[float, float]:
    """Return the largest relative error (value, gradient) over five roundings."""
    exact_value, exact_gradient = value_and_gradient(k, t, "matrix")
    values, gradients = [], []
    for scale in (1.0, 1.1, 1.3, 1.7, 1.9):  # cosine similarity does not see a common factor; rounding does
        value, gradient = value_and_gradient((k * scale).float(), (t * scale).float(), form)
        values.append(float((value.double() - exact_value).abs() / exact_value))
        gradients.append(float((gradient.double() * scale - exact_gradient).norm() / exact_gradient.norm()))
    return max(values), max(gradients)


def value_and_gradient(k: torch.Tensor, t: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss and its gradient to ``k``."""
    leaf = k.clone().requires_grad_()
    value = loss(leaf, t, form)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def loss(k: torch.Tensor, t: torch.Tensor, form: str) -> torch.Tensor:
    """Return the structure loss of two arrays (tokens, dim)."""
    grid = vf.PatchGrid(1, TOKENS, 8, 8)
    frame = vf.Frame(grid.network_size, grid.network_size)
    out, target = (vf.Descriptor(x[None], grid, (frame,), vf.Tap("key", 11), "numbers") for x in (k, t))
    return vf.structure_loss(out, target, form=form)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
