"""Expert parallelism: the experts of every MoE layer of a model, divided between the ranks of a mesh."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from kmeans_route.checks import check_module
from kmeans_route.routing.experts import Experts
from kmeans_route.routing.moe import MoE

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def expert_parallel(model: nn.Module, mesh: "DeviceMesh", *, average_gradients: bool = True) -> nn.Module:
    """Divide the experts of every `MoE` in `model` between the ranks of `mesh`; tokens travel to them and back.

    Each rank routes its own tokens and sends each to the ranks of its experts, however uneven the loads: no token is
    lost, and outputs and gradients are those of one process with the tokens of all ranks. The weights of the experts
    become DTensors sharded by expert, rank r holding experts r * ceil(E / R) and following, so that state dicts and
    torch.distributed.checkpoint know the whole; `load_state_dict` also takes whole plain tensors. All else stays as it
    is on every rank. Per layer and forward: two exchanges of rows, and before them one of counts, which are read back
    to the host, the one synchronisation. The backward has the two exchanges of rows, or one where no rank needs the
    gradient of its input. torch.compile breaks its graph at each exchange.

    The rules, since ranks wait for each other:
        - Every rank of the mesh runs as many forwards and backwards as the others, under the same dtype, autocast,
          grad mode and activation checkpointing; one without tokens passes x[:0], and its loss must still reach the
          output, as y.sum() does. A rank that differs in dtype or in needing gradients makes all ranks raise.
        - Call it before the optimizer is made, before `attach` and before DistributedDataParallel or fully_shard.
        - What is not an expert is averaged between the ranks by DistributedDataParallel(model), of this very model,
          which leaves the experts alone when the mesh holds all ranks; or by fully_shard(model, mesh=mesh,
          ignored_params=expert_parameters(model)).
        - On a mesh of ("dp", "ep"), where each expert has a replica in every row, of equal values, divide over
          mesh["ep"] and call fully_shard(layer.experts, mesh=mesh["dp"]) for each `MoE`, then fully_shard(model) over
          all ranks.
        - foreach (an optimizer's default on a GPU), fused and clip_grad_norm_ refuse plain tensors beside DTensors, as
          under DistributedDataParallel, and DTensors of different meshes: give the optimizer two groups, and clip as in
          the example. With fully_shard over the same mesh, one group and clip_grad_norm_ will do.
        - Nothing bounds what one rank gets: it needs the memory for all rows of its experts, so keep the loads even.

    Args:
        model: any module with `MoE` layers in it, changed in place. All ranks must hold the same routers; the experts
            are those of the mesh's rank 0. It may be on the meta device: then `to_empty` and each layer's
            `reset_parameters` give the numbers of one process.
        mesh: 1-D DeviceMesh of the ranks that divide the experts; a dimension of a larger one is mesh["ep"]. E need
            not be a multiple of its size R; ranks may be left without experts.
        average_gradients: divide the experts' gradients by R, as data parallelism does with all others: equal to one
            process whose loss is the mean of the ranks' losses. False leaves their sum.

    Returns:
        `model`.

    Raises:
        TypeError: model is no module, mesh no DeviceMesh. ValueError: mesh is not 1-D or does not hold this rank, or
            there is no `MoE`.
        RuntimeError: the experts have been divided or sharded already.

    Example (run by torchrun)::

        mesh = torch.distributed.device_mesh.init_device_mesh("cuda", (num_ranks,))
        expert_parallel(model, mesh)
        experts = expert_parameters(model)
        dense = [p for p in model.parameters() if p not in experts]
        model = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW([{"params": dense}, {"params": list(experts)}])
        attach(model, optimizer)
        for x, target in batches:  # of this rank
            loss_function(model(x), target).backward()
            norms = [get_total_norm([p.grad for p in group]) for group in (dense, experts)]  # torch.nn.utils
            norm = torch.linalg.vector_norm(torch.stack([norms[0], norms[1].full_tensor()]))
            for group in (dense, experts):
                clip_grads_with_norm_(group, 1.0, norm)
            optimizer.step()
            optimizer.zero_grad()
    """
    from torch.distributed.device_mesh import DeviceMesh

    check_module("model", model)
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"mesh must be a DeviceMesh, got {type(mesh).__name__}: make one with "
            "torch.distributed.device_mesh.init_device_mesh"
        )
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have 1 dimension, got {mesh.ndim}: pass that of the experts, such as mesh['ep']")
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"mesh must hold this rank, got {mesh} on rank {torch.distributed.get_rank()}: pass a mesh of all ranks "
            "that call expert_parallel"
        )
    layers = {name or "model": module for name, module in model.named_modules() if isinstance(module, MoE)}
    if not layers:
        raise ValueError(f"model must contain at least one MoE, got none in {type(model).__name__}: add an MoE")
    for name, layer in layers.items():
        if type(layer.experts) is not Experts or any(type(p) is not nn.Parameter for p in layer.experts.parameters()):
            raise RuntimeError(
                f"the experts of {name!r} must be whole on every rank, got {layer.experts} of "
                f"{type(layer.experts.down).__name__}: call expert_parallel once, before fully_shard"
            )
    from kmeans_route.parallel.experts import ParallelExperts

    for layer in layers.values():
        divided = ParallelExperts(layer.experts, mesh, average_gradients=average_gradients)
        layer.register_module("experts", divided.train(layer.training))
    if mesh.size() == torch.distributed.get_world_size():
        _keep_from_ddp(model)
    return model


def expert_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The weights of the experts in all `MoE` layers of `model`.

    Args:
        model: any module.

    Returns:
        The parameters, divided between ranks or not; empty without an `MoE`.

    Raises:
        TypeError: model is no module.
    """
    check_module("model", model)
    return {p for module in model.modules() if isinstance(module, MoE) for p in module.experts.parameters()}


def _keep_from_ddp(model: nn.Module) -> None:
    """Tell DistributedDataParallel(model) to leave the experts alone: each is on one rank, there is nothing to average.

    The attribute is what DistributedDataParallel reads; the static method that sets it is private too.
    """
    experts = expert_parameters(model)
    names = [name for name, parameter in model.named_parameters() if parameter in experts]
    before = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    model._ddp_params_and_buffers_to_ignore = [*before, *names]  # type: ignore[assignment]
