"""The learned drafter's network, whole."""

from free_kernels.ops.network.api import NetworkArguments, drafter_network, network_in_parts

__all__ = ["NetworkArguments", "drafter_network", "network_in_parts"]
