"""How the parts of a network train: whole, not at all, or by adapters beside their linear layers (LoRA, by `peft`).

A checkpoint of adapted parts holds their weights and the adapters; whoever only runs it gets their sum.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Literal

from torch import Tensor, nn

from libra_ray.config import ModelConfig

Way = Literal["full", "frozen", "lora"]
BASE, DOWN, UP = ".base_layer.", ".lora_A.default.", ".lora_B.default."
"""What `peft` puts into the names of an adapted layer's own weights, and of both matrices beside them."""


class Adaptable(nn.Module, ABC):
    """A network whose parts may train in different ways; what is frozen is always as in evaluation."""

    @abstractmethod
    def ways(self) -> Mapping[str, Way]:
        """How its weights train, by the beginning of their names, each ending in a dot; the longest that fits counts."""

    def train(self, mode: bool = True) -> "Adaptable":
        """Training mode, except for what is frozen."""
        super().train(mode)
        if mode and "frozen" in (ways := self.ways()).values():
            for name, module in self.named_modules():
                if _way(ways, f"{name}." if name else "") == "frozen":
                    module.training = False
        return self


def adapt(network: nn.Module, config: ModelConfig) -> None:
    """Freeze what shall not train, and put adapters where they shall train instead of the weights beside them.

    Raises:
        ValueError: nothing would be left to train.
    """
    for module in [module for module in network.modules() if isinstance(module, Adaptable)]:
        if set(module.ways().values()) != {"full"}:
            _adapt(module, config)
    if not any(weight.requires_grad for weight in network.parameters()):
        raise ValueError("every part is frozen, and nothing is left to train; give full or lora to one of planner.train_*")


def plain(name: str) -> str:
    """What a weight is called in a network without adapters."""
    return name.replace(BASE, ".")


def is_adapter(name: str) -> bool:
    """Whether this is the name of an adapter's weight."""
    return DOWN in name or UP in name


def merged(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The weights of a network without adapters that answers alike."""
    return dict(_merged(weights, config.lora_alpha))


def _merged(weights: Mapping[str, Tensor], alpha: float) -> Iterator[tuple[str, Tensor]]:
    for name, value in weights.items():
        if is_adapter(name):
            continue
        if name.endswith(f"{BASE}weight"):
            down, up = (weights[name.replace(BASE, matrix)] for matrix in (DOWN, UP))
            yield plain(name), value + (alpha / len(down)) * (up @ down)
        else:
            yield plain(name), value


def _way(ways: Mapping[str, Way], name: str) -> Way:
    return ways[max((beginning for beginning in ways if name.startswith(beginning)), key=len)]


def _adapt(module: Adaptable, config: ModelConfig) -> None:
    ways = module.ways()
    trained = {name for name, weight in module.named_parameters() if weight.requires_grad and _way(ways, name) == "full"}
    # Not its subclasses: those are read by others than their own forward.
    layers = [name for name, layer in module.named_modules() if type(layer) is nn.Linear and _way(ways, f"{name}.") == "lora"]
    if layers:
        from peft import LoraConfig, inject_adapter_in_model

        lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=layers)  # type: ignore[arg-type]
        inject_adapter_in_model(lora, module)
    for name, weight in module.named_parameters():
        weight.requires_grad_(name in trained or is_adapter(name))
