"""Recovery of the head's input from one image's gradient by Gauss-Newton, exact where it converges.

The gradient gives the input f(x) of the first dense layer, and that of the last convolution's weights says which
pixel each max pool chose: some twenty thousand equations for the 784 unknowns of MNIST. The search starts at a
ridge regression from f(x) to x, fitted to random inputs. Searches that got stuck are shaken and repeated.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap

from server.base import State

DONE = 1e-6                 # squared error of all equations at which an input counts as found
DRAWN, RIDGE = 16_384, 1e-2   # inputs that the start's regression is fitted to; its penalty, relative
STEPS, FEWER = 40, 15       # of a first search; of one behind a shake, and of one with the features alone
SHAKES = (0.2, 0.4, 0.6)    # sizes of random steps, in standard deviations of the input
SPREADS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)   # standard deviations that an input may have
POWER = 30                  # iterations towards a first singular vector


def dense_input(observed: State, layer: str) -> Tensor:
    """Return a dense layer's input for one image, by the first singular vectors (Phong et al., IEEE TIFS 2018)."""
    weight, bias = observed[f"{layer}.weight"].double(), observed[f"{layer}.bias"].double()
    whole, units = torch.cat([weight, bias[:, None]], 1), bias
    for _ in range(POWER):
        units = whole @ (units @ whole)
        units = units / units.norm()
    return ((units @ weight) / (units @ bias)).float()


def before_dense(layers: nn.Module) -> tuple[nn.Sequential, int]:
    """Return the layers up to the first dense one, and that one's number."""
    every = list(layers.children())
    dense = next(i for i, layer in enumerate(every) if isinstance(layer, nn.Linear))
    return nn.Sequential(*every[:dense]), dense


def head_input(head: nn.Module, observed: list[State], shape: tuple[int, int, int], hops: int,
               copies: int) -> Tensor:
    """Return a head's inputs behind P gradients of one image each, after ``hops`` shakes of ``copies`` at most."""
    problem = problem_of(head, observed)
    with torch.no_grad():
        found = ridge_start(problem.before, problem.features, shape)
    every = torch.arange(len(found))
    found, error = search(problem, every, found, STEPS)
    for _ in range(hops):
        todo = every[error > DONE]
        if not len(todo):
            break
        start = found[todo].repeat(copies, 1, 1, 1)
        size = torch.tensor(SHAKES)[torch.arange(copies) % len(SHAKES)].repeat_interleave(len(todo))
        spread = start.flatten(1).std(1)
        start = start + (size * spread)[:, None, None, None] * torch.randn_like(start)
        tried, value = search(problem, todo.repeat(copies), start, FEWER)
        value, best = value.view(copies, -1).min(0)
        better = value < error[todo]
        tried = tried.unflatten(0, (copies, -1))[best, torch.arange(len(todo))]
        found[todo[better]], error[todo[better]] = tried[better], value[better]
    return found


@dataclass(frozen=True)
class Problem:
    """The equations for P inputs."""

    before: nn.Sequential   # the layers before the dense one
    convolution: str        # the name of the last one's weights
    features: Tensor        # P x D, the dense layer's inputs
    slope: Tensor           # P x D, the loss's derivative by them
    routed: Tensor          # P x W, the gradient of the convolution

    def residuals(self, which: Tensor, with_routed: bool) -> Callable[[Tensor], Tensor]:
        """Return a function of inputs for N problems, ``N x C x H x W -> N x E``, 0 where an input is right."""
        goal, slope = self.features[which], self.slope[which]
        size = goal.norm(dim=1, keepdim=True).clamp_min(1e-12)
        if not with_routed:
            return lambda x: (self.before(x) - goal) / size
        routed = self.routed[which]
        routed_size = routed.norm(dim=1, keepdim=True).clamp_min(1e-12)
        weights = {self.convolution: self.before.get_parameter(self.convolution).detach()}

        def of_one(x: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
            made, *pulls = vjp(lambda w: functional_call(self.before, w, (x[None],))[0], weights)
            return made, pulls[0](slope)[0][self.convolution].flatten()

        def residual(x: Tensor) -> Tensor:
            made, gradient = vmap(of_one)(x, slope)
            return torch.cat([(made - goal) / size, (gradient - routed) / routed_size], 1)
        return residual


def problem_of(head: nn.Module, observed: list[State]) -> Problem:
    """Set up the equations that follow from the gradients of one image each."""
    before, dense = before_dense(head.get_submodule("features"))
    weight = head.get_parameter(f"features.{dense}.weight").detach()
    features = torch.stack([dense_input(gradient, f"features.{dense}") for gradient in observed])
    slope = torch.stack([gradient[f"features.{dense}.bias"] for gradient in observed]) @ weight
    last = [i for i, layer in enumerate(before) if isinstance(layer, nn.Conv2d)][-1]
    routed = torch.stack([gradient[f"features.{last}.weight"].flatten() for gradient in observed])
    return Problem(before, f"{last}.weight", features, slope, routed)


def search(problem: Problem, which: Tensor, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Search with all equations, then with the features alone; return inputs and the error of all equations."""
    every = problem.residuals(which, with_routed=True)
    x, error = gauss_newton(every, start, steps)
    near, _ = gauss_newton(problem.residuals(which, with_routed=False), x, FEWER)
    with torch.no_grad():
        value = every(near).square().sum(1)
    better = value < error
    return torch.where(better[:, None, None, None], near, x), torch.where(better, value, error)


def gauss_newton(residuals: Callable[[Tensor], Tensor], start: Tensor, steps: int,
                 inner: int = 20) -> tuple[Tensor, Tensor]:
    """Solve N problems by Levenberg and Marquardt's method, each step by conjugate gradients."""
    def each(value: Tensor) -> Tensor:
        return value[:, None, None, None]

    x, damping = start.detach().clone(), torch.full((len(start),), 1e-2)
    with torch.no_grad():
        error = residuals(x).square().sum(1)
    # The mean squared singular value, from one random direction: the unit of the damping.
    scale = jvp(residuals, (x,), (torch.randn_like(x),))[1].square().sum(1) / x[0].numel()
    for _ in range(steps):
        value, *pulls = vjp(residuals, x)
        pull = pulls[0]
        step, left = torch.zeros_like(x), pull(value)[0]
        direction, size = left, left.flatten(1).square().sum(1)
        for _ in range(inner):
            curved = pull(jvp(residuals, (x,), (direction,))[1])[0] + each(damping * scale) * direction
            length = size / (direction * curved).flatten(1).sum(1).clamp_min(1e-30)
            step, left = step + each(length) * direction, left - each(length) * curved
            size, before = left.flatten(1).square().sum(1), size
            direction = left + each(size / before.clamp_min(1e-30)) * direction
        with torch.no_grad():
            tried = x - step
            value = residuals(tried).square().sum(1)
        better = value < error
        x, error = torch.where(each(better), tried, x), torch.where(better, value, error)
        damping = torch.where(better, damping / 3, damping * 4).clamp(1e-6, 1e6)
    return x, error


def ridge_start(before: nn.Sequential, features: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Guess inputs by ridge regression from features to normal inputs, whose features have the right norm."""
    def features_of(inputs: Tensor) -> Tensor:
        return torch.cat([before(part) for part in inputs.split(512)])
    norm, unit = features.norm(dim=1).median(), torch.randn(256, *shape)
    spread = min(SPREADS, key=lambda s: abs(float(features_of(s * unit).norm(dim=1).median() / norm) - 1))
    drawn = spread * torch.randn(DRAWN, *shape)
    seen = features_of(drawn)
    centre = seen.mean(0)
    square, cross = (seen - centre).T @ (seen - centre), (seen - centre).T @ drawn.flatten(1)
    penalty = RIDGE * square.diagonal().mean() * torch.eye(len(square))
    found = (features - centre) @ torch.linalg.solve(square + penalty, cross)
    # Regression shrinks; what it finds gets the spread that inputs have.
    return (found * (spread / found.std().clamp_min(1e-12))).unflatten(1, shape)
