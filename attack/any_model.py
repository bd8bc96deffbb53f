"""Invert a classifier that another program trained, or its gradients: any PyTorch model with a cross-entropy loss.

    from attack.any_model import invert_classes, invert_gradient, load_gradient, load_model
    model = load_model("net.py:Net", "w.pt", shape=(1, 28, 28))
    images, labels = invert_gradient(model, load_gradient("g.pt", model), attack="cosine_tv")
    pictures = invert_classes(model, labels, attack="margin")

Images are ``N x C x H x W`` in [0, 1]; a model trained on normalised inputs gets its ``mean`` and ``std``.
"""
import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from attack import classes, gradients, model_files, newton
from attack.adversaries import Adversary, Budget, Knowledge, PublicImages, held
from devices import seed_torch
from server.base import State
from utils import InputError

NET = "net."        # before the names of a model's parameters, in ``AnyModel``
FEW_VALUES = 0.1    # of a dense layer, per pixel: with fewer, its input hardly determines the image
EXACT = 1e-4        # relative error at which a dense layer's input counts as the image itself


class AnyModel(nn.Module):
    """A classifier from images in [0, 1] to logits, ``N x num_classes``.

    Args:
        net: the model, which returns logits, an object with ``logits``, or a tuple that begins with them.
        shape: ``(C, H, W)``.
        mean: subtracted from each channel before the model sees it; one number or C.
        std: divided by.

    Attributes:
        output_layer: the name of the layer that gives the class scores.
        dense_layer: the name of the first dense layer with a bias that sees one vector per image, or None.
        dense_size: the length of that vector.
        patches: the names of a first convolution that cuts the image into patches, and of the positions that are
            added to what it makes of them, as in a vision transformer; None without, or with too few channels.
    """

    over = staticmethod(gradients.one_by_one)   # how many problems are solved at a time
    channels_last = False   # a model's `view` may need the usual order in memory
    mean: Tensor
    std: Tensor
    dense_layer: str | None

    def __init__(self, net: nn.Module, shape: Sequence[int], mean: Sequence[float] = (0.0,),
                 std: Sequence[float] = (1.0,)) -> None:
        super().__init__()
        self.net, self.image_shape = net.float().eval().requires_grad_(False), as_shape(shape)
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, shape[0]):
                raise InputError(f"--{name}: give one number, or one for each of {shape[0]} channels")
            self.register_buffer(name, torch.tensor(values).float()[:, None, None], persistent=False)
        self._find_layers()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits; attention takes the kernel that can be differentiated twice."""
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                made = self.net(((x - self.mean) / self.std).flatten(1).unflatten(1, self.image_shape))
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
        made = getattr(made, "logits", made)
        return made[0] if isinstance(made, tuple) else made

    def _find_layers(self) -> None:
        calls: list[tuple[str, nn.Module, Tensor]] = []   # of layers with weights, in the order in which they run
        hooks = [layer.register_forward_pre_hook(
            lambda layer, given, name=name: calls.append((name, layer, given[0])))
            for name, layer in self.named_modules() if isinstance(getattr(layer, "weight", None), Tensor)]
        shape = " x ".join(map(str, self.image_shape))
        try:
            with torch.no_grad():
                logits = self(torch.rand(2, *self.image_shape))
        except Exception as error:
            raise InputError(f"--model: it cannot be given images of {shape} ({model_files.first_line(error)}); "
                             "give their --shape C H W") from error
        finally:
            for hook in hooks:
                hook.remove()
        if not (isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == 2):
            raise InputError("--model: it must return class scores N x CLASSES, and returns "
                             + (f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else "no tensor"))
        if not logits.isfinite().all():
            raise InputError("--model: its class scores of an image of noise are not finite")
        self.num_classes = logits.shape[1]
        self.output_layer = next((name for name, layer, _ in reversed(calls)
                                  if len(layer.get_parameter("weight")) == self.num_classes), "")
        dense = [(name, given.shape[1]) for name, layer, given in calls
                 if isinstance(layer, nn.Linear) and layer.bias is not None and given.ndim == 2]
        self.dense_layer, self.dense_size = dense[0] if dense else (None, 0)
        self.patches = self._positions_behind(*calls[0][:2]) if calls else None

    def _positions_behind(self, name: str, layer: nn.Module) -> tuple[str, str] | None:
        """Return the names of the patch layer and of the parameter with its output's gradient, or None."""
        if not (isinstance(layer, nn.Conv2d) and layer.kernel_size == layer.stride and layer.padding == (0, 0)
                and layer.groups == 1):
            return None
        made: list[Tensor] = []
        weights = {key: value.detach().requires_grad_() for key, value in self.named_parameters()}
        hook = layer.register_forward_hook(lambda _, given, output: made.append(output))
        loss = functional_call(self, weights, (torch.rand(1, *self.image_shape),)).log_softmax(1)[0, 0]
        hook.remove()
        size, tokens = layer.out_channels, made[0][0, 0].numel()
        asked = [key for key, value in weights.items()
                 if size >= tokens and value.shape[-1:] == (size,) and value.numel() >= tokens * size]
        goal, *slopes = torch.autograd.grad(loss, [made[0], *(weights[key] for key in asked)], allow_unused=True)
        goal = goal[0].flatten(1).T
        return next(((name, key) for key, slope in zip(asked, slopes, strict=True) if slope is not None
                     and (slope.reshape(-1, size)[-tokens:] - goal).norm() <= EXACT * goal.norm()), None)

    def before_dense(self, x: Tensor) -> Tensor:
        """Return the input of ``dense_layer``, ``N x dense_size``."""
        given: list[Tensor] = []
        hook = self.get_submodule(self.dense_layer or "").register_forward_pre_hook(
            lambda _, inputs: given.append(inputs[0]))
        try:
            self(x)
        finally:
            hook.remove()
        return given[0]

    def in_training(self) -> "AnyModel":
        """Return a copy whose batch norm uses the batch's own statistics, as in a client's training step."""
        model = copy.deepcopy(self)
        for layer in model.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.running_mean = layer.running_var = layer.num_batches_tracked = None
                layer.track_running_stats = False
        return model


def as_shape(values: Sequence[int]) -> tuple[int, int, int]:
    """Return ``(C, H, W)``."""
    channels, height, width = values
    return channels, height, width


def load_model(source: str, weights: str, shape: Sequence[int], mean: Sequence[float] = (0.0,),
               std: Sequence[float] = (1.0,), arguments: dict | None = None) -> AnyModel:
    """Run ``FILE.py``, make the model with the class or function of ``FILE.py:NAME``, and load its weights."""
    net = model_files.build(source, arguments or {})
    net.load_state_dict(model_files.read_state(weights, net.state_dict()))
    return AnyModel(net, shape, mean, std)


def load_gradient(path: str, model: AnyModel) -> State:
    """Read a gradient: a dictionary by parameter name, or a list in the order of the parameters."""
    expected: State = {**dict(model.net.named_parameters())}
    given = model_files.read_state(path, expected, also=model.net.state_dict().keys(), prefix=NET)
    return not_zero(given, f"--gradient: {path} is 0 everywhere")


def load_update(before: str, after: str, model: AnyModel, lr: float) -> State:
    """Read the sum of the gradients of a client's SGD steps, ``(before - after) / lr``, from two state dicts."""
    old, new = (model_files.read_state(path, model.net.state_dict()) for path in (before, after))
    update = {f"{NET}{name}": (old[name] - new[name]) / lr for name, _ in model.net.named_parameters()}
    return not_zero(update, f"--update: {before} and {after} hold the same parameters")


def not_zero(gradient: State, fault: str) -> State:
    """Return a gradient; InputError if it is 0 everywhere, which shows no image."""
    if not any(bool(value.any()) for value in gradient.values()):
        raise InputError(f"{fault}; give the files of a training step")
    return gradient


def gradient_of(model: AnyModel, images: Tensor, labels: Tensor, bn: str = "train") -> State:
    """Return the gradient of a training step on ``B x C x H x W``; ``bn`` as of ``invert_gradient``."""
    return gradients.gradient(model.in_training() if bn == "train" else model, images, labels)


def adversary_of(model: AnyModel, budget: Budget, bn: str = "train", public: PublicImages | None = None,
                 seed: int = 1, at: AnyModel | None = None) -> Adversary:
    """Return an adversary who holds a model; ``at`` is the model of the gradients, if another.

    Without public images, it takes a grey picture for their mean.
    """
    at = model if at is None else at
    knowledge = Knowledge(model, None, False, model.image_shape,
                          next_head=at.in_training() if bn == "train" else at)
    grey = PublicImages(torch.full((1, *model.image_shape), 0.5), torch.zeros(1, dtype=torch.long))
    return Adversary(knowledge, model, grey if public is None else public, 0.0, budget,
                     lambda what: seed_torch(seed, what))


def unfit(attack: str, model: AnyModel, count: int, steps: int, bn: str = "train") -> str | None:
    """Return why an attack on a gradient cannot be run on a model; None if it can."""
    if not model.output_layer:
        return "no layer gives the class scores, so no label can be read off a gradient"
    each = -(-count // steps)
    if bn == "train":
        try:
            model.in_training()(torch.rand(count % each or each, *model.image_shape))
        except ValueError as error:
            return f"batch norm has no statistics of so small a batch ({error}); give --bn eval"
    if attack != "cosine_tv" and (count > 1 or steps > 1):
        return f"{attack} needs the gradient of one image"
    if attack == "analytic" and model.patches:
        return None
    if attack == "analytic" and model.dense_layer is None:
        return "analytic needs a dense layer with a bias that is given one vector per image"
    pixels = torch.Size(model.image_shape).numel()
    if attack == "analytic" and model.dense_size < FEW_VALUES * pixels:
        return (f"analytic: the first dense layer ({(model.dense_layer or '').removeprefix(NET)}) is given "
                f"{model.dense_size} values per image, too few for {pixels}")
    return None


def analytic(adversary: Adversary, observed: list[State], count: int) -> tuple[Tensor, Tensor]:
    """Recover the first dense layer's input exactly; the image is that input reordered, or is searched.

    A vision transformer's image follows from its patches' convolution and positions (``from_patches``).
    """
    head, budget = held(adversary.knowledge.next_head), adversary.budget
    assert isinstance(head, AnyModel)
    labels = gradients.single_labels(observed, head.output_layer)
    if head.patches:
        return torch.stack([from_patches(head, *head.patches, one) for one in observed])[None], labels
    goal = torch.stack([newton.dense_input(one, head.dense_layer or "") for one in observed])
    before = gradients.one_by_one(lambda x: head.before_dense(x[None])[0])
    found = reordered(before, goal, head.image_shape)[None]
    wrong = (before(found[0]) - goal).norm() > EXACT * goal.norm() if found.isfinite().all() else True
    if wrong:
        start = adversary.random_inputs(count, *head.image_shape)
        found, _ = gradients.from_features(before, goal, start, budget.iterations, 1e-4, True, lr=0.1)
    return found.clamp(0, 1), labels


def from_patches(model: AnyModel, layer: str, positions: str, observed: State) -> Tensor:
    """Return the image ``C x H x W`` behind a vision transformer's gradient (APRIL, Lu et al. 2022, CVPR).

    The gradient of the positions is that of the patches' tokens, ``T x D``, and the one of the convolution is the
    sum over patches of token gradient times patch: D equations for T unknowns, for each pixel of a patch.
    """
    convolution = observed[f"{layer}.weight"].double()
    side, size = convolution.shape[2:], len(convolution)
    tokens = observed[positions].double().reshape(-1, size)
    count = model.image_shape[1] // side[0] * (model.image_shape[2] // side[1])
    patches = torch.linalg.lstsq(tokens[-count:].T, convolution.flatten(1), driver="gelsd").solution   # T x pixels
    image = F.fold(patches.T, model.image_shape[1:], tuple(side), stride=tuple(side)).float()
    return (image * model.std + model.mean).clamp(0, 1)


def reordered(before: Callable[[Tensor], Tensor], goal: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the images with ``before(x) = goal`` if that only reorders, scales and shifts pixels."""
    zero = torch.zeros(len(goal), *shape)
    value, *pulls = vjp(before, zero)
    squared = pulls[0](jvp(before, (zero,), (torch.ones_like(zero),))[1])[0]   # the factor of each pixel
    return pulls[0](goal - value)[0] / squared


def solve(attack: str, adversary: Adversary, observed: list[State], count: int,
          steps: int) -> tuple[Tensor, Tensor]:
    """Invert gradients or updates of ``count`` images in all: images ``R x count x C x H x W``, and labels."""
    each = count // len(observed)
    if each > 1 or steps > 1:
        run: Callable = partial(gradients.invert_update, steps=steps)
    else:
        run = {"dlg": gradients.dlg, "cosine_tv": gradients.cosine_tv, "analytic": analytic}[attack]
    images, labels = zip(*(run(adversary, [one], each) for one in observed), strict=True)
    most = max(map(len, images))   # an exact solution has no restarts
    return torch.cat([part.expand(most, *part.shape[1:]) for part in images], 1), torch.cat(labels)


def invert_gradient(model: AnyModel, observed: State, attack: str = "cosine_tv", *, count: int = 1,
                    steps: int = 1, bn: str = "train", seed: int = 1, **budget: float) -> tuple[Tensor, Tensor]:
    """Return the images behind a gradient, ``count x C x H x W``, and their labels ``count``.

    Args:
        attack: ``cosine_tv``, ``dlg`` or ``analytic``; the latter two for one image.
        count: number of images behind the gradient or update.
        steps: number of SGD steps, of equal batches, whose gradients are summed.
        bn: ``train`` if the client's batch norm used the statistics of its batch, as in training; else ``eval``.
        budget: ``restarts`` (3), ``iterations`` (300), ``tv`` (0.2), ``lr`` of the client's steps (0.1).
    """
    if why := unfit(attack, model, count, steps, bn):
        raise InputError(why)
    seed_torch(seed, attack)
    adversary = adversary_of(model, budget_of(**budget), bn, seed=seed)
    images, labels = solve(attack, adversary, [observed], count, steps)
    return images[0], labels


def invert_classes(model: AnyModel, labels: Tensor, attack: str = "margin", *, public: Tensor | None = None,
                   seed: int = 1, **budget: float) -> Tensor:
    """Return an image of each label's class, ``N x C x H x W``, by ``mi_face``, ``margin`` or ``gmi``.

    Args:
        public: images that look like the training images; ``gmi`` needs them.
        budget: ``restarts`` (3), ``iterations`` (300), and ``epochs`` of gmi's generator (20).
    """
    if attack == "gmi" and public is None:
        raise InputError("gmi needs public images")
    images = None if public is None else PublicImages(public, torch.zeros(len(public), dtype=torch.long))
    adversary = adversary_of(model, budget_of(**budget), public=images, seed=seed)
    seed_torch(seed, attack)
    return getattr(classes, attack)(adversary, labels)[0]


def budget_of(restarts: float = 3, iterations: float = 300, epochs: float = 20, lr: float = 0.1,
              tv: float = 0.2) -> Budget:
    """Return the limits of an attack on a model without latents."""
    return Budget(int(restarts), int(iterations), int(epochs), 1, lr, 1, tv=tv)
