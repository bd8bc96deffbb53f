"""The table of methods: what sets each apart from FedAvg.

Which network a client trains, which of its parameters travel, what is added to its loss, and what its server
does. Everything else, in update.py and in the driver, is common to all.
"""
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

import models
from server.mean import Server, State
from server.privacy import AdaptiveClientDP, ClientDP, NbAFL


@dataclass(frozen=True)
class Method:
    """One row of the table: ``travels`` is the prefix of the parameters that leave a client."""

    network: type[nn.Module]
    travels: str | None   # "classifier." is the head, and all of the plain CNN; None: nothing leaves
    source: str
    server: type[Server] = Server
    loss: Callable[[nn.Module, Tensor, float], Tensor] | None = None   # model, images, weight -> ``N``, added
    poisson: bool = False   # clients sampled independently, as the accounting of client-level DP needs

    def split(self, state: State) -> tuple[State, State]:
        """A state dict -> what is shared, what stays private."""
        shared = {name: value for name, value in state.items()
                  if self.travels is not None and name.startswith(self.travels)}
        return shared, {name: value for name, value in state.items() if name not in shared}

    def count(self, model: nn.Module) -> dict[str, int]:
        """Numbers of parameters: of each part, in all, and of what leaves the client."""
        sizes = {name: value.numel() for name, value in model.state_dict().items()}
        parts = {part: sum(n for name, n in sizes.items() if name.startswith(f"{part}."))
                 for part, _ in model.named_children()}
        return {**parts, "total": sum(sizes.values()), "travels": sum(sizes[n] for n in self.split(sizes)[0])}

    def build(self, image_shape: tuple[int, int, int], num_classes: int, init_logvar: float) -> nn.Module:
        """The network at its start; draws from PyTorch's generator."""
        noise = {"init_logvar": init_logvar} if self.network is models.RVE else {}
        return self.network(image_shape, num_classes, **noise)


METHODS = {
    "rve_pfl": Method(models.RVE, "classifier.", "Issa et al. 2024, doi 10.1109/TIFS.2024.3368879"),
    "lg_fedavg": Method(models.EncoderClassifier, "classifier.", "Liang et al. 2020, arXiv 2001.01523"),
    "local": Method(models.RVE, None, "RVE-PFL's model, nothing shared: the honest floor"),
    "fedavg": Method(models.CNN, "classifier.", "McMahan et al. 2017, arXiv 1602.05629"),
    "fedper": Method(models.CNN, "classifier.features.", "Arivazhagan et al. 2019, arXiv 1912.00818"),
    "nbafl": Method(models.CNN, "classifier.", "Wei et al. 2020, arXiv 1911.00222", NbAFL),
    "client_dp": Method(models.CNN, "classifier.", "McMahan et al. 2018, arXiv 1710.06963", ClientDP,
                        poisson=True),
    "client_dp_adaptive": Method(models.CNN, "classifier.", "Andrew et al. 2021, arXiv 1905.03871",
                                 AdaptiveClientDP, poisson=True),
    "dropout": Method(models.DropoutCNN, "classifier.", "Zheng 2021, arXiv 2108.11106"),
    "ressfl": Method(models.ResSFL, "classifier.", "after Li et al. 2022, CVPR",
                     loss=models.ResSFL.resistance),
}
